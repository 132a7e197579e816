"""Decode's end of a link, without a device: payloads are there at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch

from cluster.kv.assembly import BlockRun
from cluster.kv.doorkeeper import Terms
from cluster.kv.geometry import KvGeometry
from cluster.kv.transport.frames import Frame, Open
from cluster.kv.transport.hello import (
    Payload,
)
from cluster.kv.transport.inbound_links import InboundLinks
from cluster.kv.transport.linked_inbound import LinkedInbound
from cluster.kv.transport.staging import Staging
from cluster.ticket import TicketSigner

SIGNER = TicketSigner(b"the cluster's secret")
TERMS = Terms("decode", "decode-life", "layout", KvGeometry(1, 2, 4), 0)
LINK, HANDOFF, SIZE, SLOTS = 7, "a" * 32, 64, 4


class FakeLink:
    """Payloads are there at once, filled with their sequence number."""

    copies = None

    def __init__(self) -> None:
        self.aborted = ""
        self.received = 0

    async def receive(self, slot: Any) -> None:
        slot.payload.fill_(self.received)
        self.received += 1

    def mark(self) -> None: ...

    async def reached(self, fence: None) -> None: ...

    def release(self, fence: None, free: Callable[[], None]) -> None:
        free()

    def abort(self, reason: str) -> None:
        self.aborted = self.aborted or reason


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
        self.staging = Staging(torch.device("cpu"), SLOTS * SIZE, SIZE)
        self.links = InboundLinks(SIGNER, TERMS, torch.device("cpu"), 1.0, None, self.staging)
        self.link = FakeLink()
        self.links._links[LINK] = self.link  # type: ignore[assignment]
        self.push = FakePush()
        self.inbound = LinkedInbound(self.push, self.links)  # type: ignore[arg-type]

    async def open(self) -> None:
        self.push.frames.put_nowait(Open(b"ticket", 0, LINK))
        assert isinstance(await self.inbound.receive(), Open)
        self.inbound.claim(HANDOFF)

    async def arrive(self, sequence: int, handoff_id: str = HANDOFF, summed: bool = False) -> None:
        run = BlockRun(sequence, 0, 1, sequence, 1)
        payload = Payload(handoff_id, run, SIZE, summed)
        await self.links._arrive(LINK, self.link, payload)  # type: ignore[arg-type]

    async def next(self) -> Frame | None:
        async with asyncio.timeout(2):
            return await self.inbound.receive()

    async def all_slots_free(self) -> None:
        async with asyncio.timeout(2):
            every = [await self.staging.take(SIZE) for _ in range(SLOTS)]
        for slot in every:
            self.staging.give_back(slot)
