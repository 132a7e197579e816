"""A KV cache the size of a real model's, and an agent over it, as an engine worker has them."""

from __future__ import annotations

import time
from typing import Any

import torch

from cluster.kv.agent import HandoffAgent
from cluster.kv.doorkeeper import Terms
from cluster.kv.geometry import KvGeometry
from cluster.kv.paged import PagedCache
from cluster.kv.transport.choose import Choice, TransportOptions
from cluster.ticket import Ticket, TicketSigner, new_handoff_id, prompt_digest

LAYERS, HEADS, TOKENS, CONTENT = 32, 8, 16, 256
"""Llama-3.1-8B in bfloat16: 64 KiB a block and layer, 2 MiB a block, 128 KiB a token."""
BLOCK_BYTES = LAYERS * HEADS * TOKENS * CONTENT * 2
GEOMETRY = KvGeometry(1, HEADS, TOKENS)
SECRET = b"a benchmark's secret"


def make_agent(
    name: str,
    blocks: int,
    device: str = "cpu",
    transport: Choice = "grpc",
    frame_bytes: int = 2 << 20,
    checksums: int = 1,
    link: int | None = None,
    max_ctas: int | None = None,
) -> tuple[HandoffAgent, PagedCache]:
    """A cache of random bits and its agent, started.

    Args:
        link: MiB of device memory that a link takes; None: as configured by default.
        max_ctas: thread blocks of a transfer over NCCL; None: it decides.
    """
    more: dict[str, Any] = {} if link is None else {"link_bytes": link << 20}
    generator = torch.Generator(device).manual_seed(len(name))
    shape = (blocks, HEADS, TOKENS, CONTENT)
    cache = PagedCache(
        {
            f"layer.{i}": torch.randint(
                -(1 << 15), 1 << 15, shape, generator=generator, device=device, dtype=torch.int16
            )
            for i in range(LAYERS)
        }
    )
    agent = HandoffAgent(
        cache,
        TicketSigner(SECRET),
        Terms(name, f"{name}-life", "layout", GEOMETRY, 0),
        vocab_size=100,
        options=TransportOptions(
            transport,
            "127.0.0.1",
            frame_bytes,
            max_streams=64,
            link_checksums=checksums,
            link_max_ctas=max_ctas,
            **more,
        ),
    )
    agent.start()
    return agent, cache


def make_ticket(num_tokens: int) -> tuple[Ticket, str]:
    """A handoff from `prefill` to `decode`, and its signed form."""
    now = time.time()
    ticket = Ticket(
        handoff_id=new_handoff_id(),
        request_id="bench",
        model="model",
        prefill_worker="prefill",
        prefill_incarnation="prefill-life",
        decode_worker="decode",
        decode_incarnation="decode-life",
        prompt_digest=prompt_digest([num_tokens]),
        num_tokens=num_tokens,
        tenant_salt="",
        layout="layout",
        prefill_geometry=GEOMETRY.encode(),
        decode_geometry=GEOMETRY.encode(),
        issued_at=now,
        expires_at=now + 120,
    )
    return ticket, TicketSigner(SECRET).sign(ticket).decode()
