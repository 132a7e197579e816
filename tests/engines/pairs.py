"""Real engines in this process that hand off to each other: no router, no worker, no Ray."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import HandoffConfig, ModelConfig
from cluster.engine.protocol import EngineInfo, EngineRequest, Sampling
from cluster.engine.vllm import VllmEngine
from cluster.kv.handoff import HandoffParams, HandoffResult
from cluster.ticket import Ticket, TicketSigner, new_handoff_id, prompt_digest
from prefill_worker.servicer import one_token

RECALL = Path(__file__).resolve().parents[2] / "examples" / "recall-tiny"
SECRET = b"a secret for one test"
VOCABULARY = 512


def model_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A model of the given shape with recall-tiny's tokenizer; its weights are to be dummies."""
    folder.mkdir()
    for file in RECALL.iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Side:
    """One engine, named as tickets name it."""

    name: str
    engine: VllmEngine
    info: EngineInfo

    async def tokens(self, request: EngineRequest) -> list[int]:
        ids: list[int] = []
        async for output in self.engine.generate(request):
            assert output.finish_reason != "error"
            ids += output.token_ids
        return ids

    async def whole(self, name: str, prompt: list[int], sampling: Sampling) -> list[int]:
        return await self.tokens(EngineRequest(name, prompt, sampling, "whole"))

    async def assert_nothing_held(self) -> None:
        holdings = await self.engine.holdings()
        assert (holdings.ledger, holdings.blocks_used, holdings.leaked_blocks) == ((), 0, 0)


async def start_side(name: str, path: Path, **settings: Any) -> Side:
    model = ModelConfig(
        **{
            "name": "m",
            "path": str(path),
            "dtype": "float32",
            "max_num_batched_tokens": 256,
            "kv_cache_bytes": 64 << 20,
            "enforce_eager": True,
            **settings,
        }
    )
    engine = VllmEngine(model, HandoffConfig(), name, f"{name}-1", SECRET, "127.0.0.1", 1)
    return Side(name, engine, await engine.start())


@asynccontextmanager
async def started(path: Path, shapes: dict[str, dict[str, Any]]) -> AsyncIterator[list[Side]]:
    """A side for each name with its settings; they start, and end, at the same time."""
    starts = [asyncio.create_task(start_side(n, path, **each)) for n, each in shapes.items()]
    done = await asyncio.gather(*starts, return_exceptions=True)
    sides = [side for side in done if isinstance(side, Side)]
    try:
        for failure in done:
            if isinstance(failure, BaseException):
                raise failure
        yield sides
    finally:
        await asyncio.gather(*(side.engine.stop() for side in sides))


async def split(
    prefill: Side, decode: Side, name: str, prompt: list[int], sampling: Sampling
) -> tuple[list[int], HandoffResult]:
    """Prefill on one engine, decode on the other; what decode said, and its handoff."""
    now = time.time()
    ticket = Ticket(
        handoff_id=new_handoff_id(),
        request_id=name,
        model="m",
        prefill_worker=prefill.name,
        prefill_incarnation=f"{prefill.name}-1",
        decode_worker=decode.name,
        decode_incarnation=f"{decode.name}-1",
        prompt_digest=prompt_digest(prompt),
        num_tokens=len(prompt),
        tenant_salt="",
        layout=decode.info.layout,
        prefill_geometry=prefill.info.geometry,
        decode_geometry=decode.info.geometry,
        issued_at=now,
        expires_at=now + 60,
    )
    wire = TicketSigner(SECRET).sign(ticket).decode()
    handoff_id = ticket.handoff_id
    send = HandoffParams(
        side="prefill",
        handoff_id=handoff_id,
        ticket=wire,
        num_tokens=len(prompt),
        expires_in=60.0,
        peers=decode.info.transfer_addresses,
        peer_worker=decode.name,
        peer_incarnation=f"{decode.name}-1",
        peer_geometry=decode.info.geometry,
    )
    take = HandoffParams("decode", handoff_id, wire, len(prompt), 60.0)
    decode.engine.expect_handoff(handoff_id)
    try:
        both = await asyncio.gather(
            prefill.tokens(EngineRequest(f"{name}-p", prompt, one_token(sampling), "split", send)),
            decode.tokens(EngineRequest(f"{name}-d", prompt, sampling, "split", take)),
            return_exceptions=True,
        )
        result = await asyncio.wait_for(decode.engine.handoff_result(handoff_id), 10)
        assert result.error == "", (result.error, both)
        first, tokens = both
        assert isinstance(first, list) and isinstance(tokens, list), both
        assert first == tokens[:1], (first, tokens)
        return tokens, result
    finally:
        decode.engine.forget_handoff(handoff_id)
