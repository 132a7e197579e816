"""Decode's end of a link, without a device: both ends have the same memory, so that what prefill
has in a slot has been put there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch

from cluster.kv.assembly import BlockRun
from cluster.kv.doorkeeper import Terms
from cluster.kv.geometry import KvGeometry
from cluster.kv.transport.frames import Frame, Open
from cluster.kv.transport.hello import Payload
from cluster.kv.transport.inbound_links import InboundLinks
from cluster.kv.transport.link import LinkTerms
from cluster.kv.transport.link_slots import LinkSlots
from cluster.kv.transport.linked_inbound import LinkedInbound
from cluster.ticket import TicketSigner

SIGNER = TicketSigner(b"the cluster's secret")
TERMS = Terms("decode", "decode-life", "layout", KvGeometry(1, 2, 4), 0)
LINK, HANDOFF, SIZE, SLOTS = 7, "a" * 32, 64, 4
LINK_TERMS = LinkTerms(torch.device("cpu"), 1.0, None, SLOTS * SIZE)


class FakeLink:
    """Payloads are there at once."""

    copies = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.aborted = ""
        self.received = 0
        self.unused = 0
        self.memory = torch.zeros(SLOTS, SIZE, dtype=torch.uint8)
        self.slots = LinkSlots(self.memory, self._unused)
        self._when_down: list[Callable[[], None]] = []

    def when_down(self, call: Callable[[], None]) -> None:
        self._when_down.append(call)

    def _unused(self) -> None:
        self.unused += 1

    async def receive(self, slot: Any) -> None:
        self.received += 1

    def mark(self) -> None: ...

    async def reached(self, fence: None) -> None: ...

    def release(self, fence: None, free: Callable[[], None]) -> None:
        free()

    def abort(self, reason: str) -> None:
        if not self.aborted:
            self.aborted = reason
            self.slots.close(reason)
            for call in self._when_down:
                call()


class FakePush:
    """The gRPC stream of a push."""

    transport = "grpc"

    def __init__(self) -> None:
        self.frames: asyncio.Queue[Frame | Exception | None] = asyncio.Queue()

    async def receive(self) -> Frame | None:
        frame = await self.frames.get()
        if isinstance(frame, Exception):
            raise frame
        return frame


class Bench:
    """One link that is up, and one push that was opened over it."""

    def __init__(self) -> None:
        self.links = InboundLinks(SIGNER, TERMS, LINK_TERMS)
        self.link = FakeLink()
        self.sender = LinkSlots(self.link.memory, lambda: None)
        self.links._links[LINK] = self.link  # type: ignore[assignment]
        self.push = FakePush()
        self.inbound = LinkedInbound(self.push, self.links)  # type: ignore[arg-type]

    async def open(self) -> None:
        self.push.frames.put_nowait(Open(b"ticket", 0, LINK))
        assert isinstance(await self.inbound.receive(), Open)
        self.inbound.claim(HANDOFF)

    async def arrive(self, sequence: int, handoff_id: str = HANDOFF, summed: bool = False) -> None:
        """A payload filled with its number, when there is a slot for it."""
        slot = await self.sender.take(SIZE)
        slot.payload.fill_(sequence)
        run = BlockRun(sequence, 0, 1, sequence, 1)
        payload = Payload(handoff_id, run, SIZE, summed, slot.index)
        await self.links._arrive(LINK, self.link, payload, self.read)  # type: ignore[arg-type]

    def read(self, index: int) -> None:
        self.link.slots.give_back(index)
        self.sender.give_back(index)

    async def next(self) -> Frame | None:
        async with asyncio.timeout(30):
            return await self.inbound.receive()

    def all_slots_free(self) -> bool:
        return self.link.slots.free == self.sender.free == SLOTS
