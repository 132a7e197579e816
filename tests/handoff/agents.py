"""Two handoff agents over small random caches: the real transfer, without engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from cluster.kv.agent import HandoffAgent
from cluster.kv.doorkeeper import Terms
from cluster.kv.geometry import KvGeometry
from cluster.kv.handoff import HandoffParams, HandoffResult
from cluster.kv.mailbox import Finished
from cluster.kv.paged import PagedCache
from cluster.kv.reservation import Reserve
from cluster.kv.sender import Arrival, Offer, Release
from cluster.kv.transport.choose import Choice, TransportOptions
from cluster.ticket import Ticket, TicketSigner, new_handoff_id, prompt_digest

SECRET = b"the cluster's secret"
LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 3, 16, 2, 4, 8
LARGE = 40
"""Times as much content makes blocks that are sent from where they lie and read to their places."""


@dataclass
class Where:
    """Where the caches are and how KV crosses, as pytest was told (`tests/conftest.py`)."""

    device: Literal["cpu", "cuda"] = "cpu"
    transport: Choice = "grpc"

    def of(self, worker: str) -> torch.device:
        """One worker's device."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", int(worker == "decode" and torch.cuda.device_count() > 1))


WHERE = Where()


def random_cache(seed: int, times: int = 1, worker: str = "prefill") -> PagedCache:
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, HEADS, TOKENS, CONTENT * times)
    layers = (torch.rand(shape, generator=generator) for _ in range(LAYERS))
    device = WHERE.of(worker)
    cache = PagedCache({f"layer.{i}": layer.to(device) for i, layer in enumerate(layers)})
    if WHERE.transport != "grpc":
        cache._places = None  # as on a device: nothing leaves from where it lies
    return cache


GEOMETRY = KvGeometry(1, HEADS, TOKENS)


def start_agent(
    name: str,
    cache: PagedCache,
    max_message_bytes: int = 4096,
    geometry: KvGeometry = GEOMETRY,
    rank: int = 0,
    incarnation: str = "",
) -> HandoffAgent:
    agent = HandoffAgent(
        cache,
        TicketSigner(SECRET),
        Terms(name, incarnation or f"{name}-life", "layout", geometry, rank),
        vocab_size=100,
        options=TransportOptions(
            WHERE.transport, "127.0.0.1", max_message_bytes, max_streams=64, link_bytes=1 << 20
        ),
    )
    agent.start()
    return agent


def make_ticket(num_tokens: int, seconds: float = 20.0, **changes: str) -> Ticket:
    now = time.time()
    ticket = Ticket(
        handoff_id=new_handoff_id(),
        request_id="request",
        model="model",
        prefill_worker="prefill",
        prefill_incarnation="prefill-life",
        decode_worker="decode",
        decode_incarnation="decode-life",
        prompt_digest=prompt_digest(range(num_tokens)),
        num_tokens=num_tokens,
        tenant_salt="",
        layout="layout",
        prefill_geometry=GEOMETRY.encode(),
        decode_geometry=GEOMETRY.encode(),
        issued_at=now,
        expires_at=now + seconds,
    )
    return replace(ticket, **changes)  # type: ignore[arg-type]


class Side:
    """One agent, as an engine drives it."""

    def __init__(self, agent: HandoffAgent, cache: PagedCache) -> None:
        self.agent = agent
        self.cache = cache
        self.finished = Finished()
        self.results: dict[str, HandoffResult] = {}

    def step(self) -> None:
        """Collects what has finished, as the engine does after every step."""
        new = self.agent.mailbox.take_finished()
        assert not (self.finished.sending & new.sending), "reported as sent twice"
        assert not (self.finished.recving & new.recving), "reported as received twice"
        self.finished.sending |= new.sending
        self.finished.recving |= new.recving
        self.finished.failed |= new.failed
        for result in self.agent.mailbox.take_results():
            assert result.handoff_id not in self.results, "ended twice"
            self.results[result.handoff_id] = result

    async def until(self, happened: Callable[[], bool], seconds: float = 30.0) -> None:
        async with asyncio.timeout(seconds):
            while True:
                self.step()
                if happened():
                    return
                await asyncio.sleep(0.002)

    async def result(self, handoff_id: str) -> HandoffResult:
        """And what the agent says just behind it: whose blocks are the engine's again."""
        await self.until(lambda: handoff_id in self.results)
        self.pinned()  # the agent's thread is through with what it did
        self.step()
        return self.results[handoff_id]

    def pinned(self) -> int:
        """Bytes in the ledger, after its integrity check."""
        return sum(entry.bytes for entry in self.agent.pins().entries)


class Prefill(Side):
    def arrive(self, ticket: Ticket, wire: bytes, *peers: str) -> None:
        """A request came to the engine."""
        params = HandoffParams(
            side="prefill",
            handoff_id=ticket.handoff_id,
            ticket=wire.decode(),
            num_tokens=ticket.num_tokens,
            expires_in=ticket.expires_at - time.time(),
            peers=peers,
            peer_worker=ticket.decode_worker,
            peer_incarnation=ticket.decode_incarnation,
            peer_geometry=ticket.decode_geometry,
        )
        arrival = Arrival(f"p-{ticket.handoff_id}", params)
        self.agent.post(lambda: self.agent.sender.arrive(arrival))

    def offer(
        self, ticket: Ticket, wire: bytes, peer: str, block_ids: tuple[int, ...], first: int = 0
    ) -> Offer:
        """The engine completed blocks in every layer; the first ones of a request bring it."""
        if first == 0:
            self.arrive(ticket, wire, peer)
        return self.compute(ticket, block_ids, first)

    def compute(self, ticket: Ticket, block_ids: tuple[int, ...], first: int = 0) -> Offer:
        """A step of the engine completed blocks in every layer."""
        last = first + len(block_ids) >= -(-ticket.num_tokens // TOKENS)
        offer = Offer(ticket.handoff_id, first, block_ids, last)
        stamp = self.agent.generations.stamp(block_ids)
        sender = self.agent.sender
        self.agent.post(lambda: sender.offer(offer))
        for layer in range(LAYERS):
            self.agent.post(lambda layer=layer: sender.layer_ready(layer, ((offer, stamp),)))  # type: ignore[misc]
        return offer

    def release(self, ticket: Ticket, token: int | None) -> None:
        """The engine is done with the request."""
        release = Release(ticket.handoff_id, token)
        self.agent.post(lambda: self.agent.sender.release(release))


class Decode(Side):
    def reserve(
        self,
        ticket: Ticket,
        wire: bytes,
        block_ids: tuple[int, ...],
        held: int = 0,
        lease: float | None = None,
    ) -> None:
        """The engine took blocks, `held` of them from its prefix cache, for as long as the ticket
        lives or for `lease` seconds."""
        reserve = Reserve(
            request=f"d-{ticket.handoff_id}",
            handoff_id=ticket.handoff_id,
            ticket=wire.decode(),
            num_tokens=ticket.num_tokens,
            block_ids=block_ids,
            held_tokens=held * self.cache.tokens,
            expires_in=ticket.expires_at - time.time() if lease is None else lease,
        )
        stamp = self.agent.generations.stamp(block_ids)
        self.agent.post(lambda: self.agent.receiver.reserve(reserve, stamp))

    def run_out(self, ticket: Ticket) -> None:
        """The lease of what was reserved ends now, if anything still watches over it."""

        def end() -> None:
            expiry = self.agent.receiver._reservations[ticket.handoff_id].expiry
            if not expiry.cancelled():
                expiry.cancel()
                self.agent.receiver._expire(ticket.handoff_id)

        self.agent.post(end)

    def frames(self, ticket: Ticket) -> int:
        """Frames landed of a handoff under way."""
        reservation = self.agent.receiver._reservations.get(ticket.handoff_id)
        return sum(part.frames for part in reservation.parts.values()) if reservation else 0

    def release(self, ticket: Ticket) -> None:
        """The request has ended in the engine."""
        self.agent.post(lambda: self.agent.receiver.release(ticket.handoff_id))


SIGNER = TicketSigner(SECRET)


def sign(ticket: Ticket, **changes: object) -> bytes:
    """Signed by this cluster, perhaps with other fields."""
    return SIGNER.sign(replace(ticket, **changes))  # type: ignore[arg-type]
