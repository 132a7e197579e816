"""Slots of staging memory: each is free again once, and not before its last copy is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.milestones import Milestones
from cluster.kv.transport.grpc_streams import StagedOutbound
from cluster.kv.transport.hello import Payload, decode_payloads
from cluster.kv.transport.link import Link
from cluster.kv.transport.outbound_links import OutboundLink
from cluster.kv.transport.staging import Staging
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Seal
from tests.unit.test_milestones import Point, until

SIZE, SLOTS = 64, 4
RUN = BlockRun(0, 0, 1, 0, 1)
PAYLOAD = Payload("a" * 32, RUN, SIZE, False)


@pytest.fixture
def staging() -> Staging:
    return Staging(torch.device("cpu"), SLOTS * SIZE, SIZE)


def free(staging: Staging) -> int:
    return staging._free.qsize()


class Call:
    """A stream whose writes pass when the test lets them, or fail."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.fails = False
        self.open = asyncio.Event()

    async def send(self, *pieces: bytes | memoryview) -> None:
        await self.open.wait()
        if self.fails:
            raise Broken("it broke")
        self.written.append(b"".join(pieces))

    async def send_sealed(
        self, head: bytes, pieces: list[memoryview], seal: Seal, lendable: bool = False
    ) -> None:
        seal.add(pieces)
        await self.send(head, *pieces, seal.end())

    async def receive(self) -> None:
        await asyncio.Event().wait()

    def cancel(self) -> None: ...


class Wire(Link):
    """A link without a device: a transfer is over when the test says so."""

    def __init__(self) -> None:
        self.broken = ""
        self._milestones = Milestones("test")
        self._aborting = None
        self.transfers: list[Point] = []

    async def send(self, slot: Any, filled: Any) -> Point:
        self._raise_if_broken()
        self.transfers.append(Point())
        return self.transfers[-1]

    def abort(self, reason: str) -> None:
        if not self.broken:
            self.broken = reason
            self._aborting = asyncio.get_running_loop().create_future()


@pytest.fixture
async def call() -> Call:
    return Call()


@pytest.fixture
async def link(call: Call, staging: Staging) -> AsyncIterator[OutboundLink]:
    made = OutboundLink(1, call, Wire(), staging)  # type: ignore[arg-type]
    yield made
    made.close("over")


async def test_a_slot_is_free_when_its_payload_has_left(
    link: OutboundLink, call: Call, staging: Staging
) -> None:
    wire: Any = link.link
    call.open.set()
    slots = [await link.staging.take(SIZE) for _ in range(2)]
    sent = [link.send(PAYLOAD, slot, None) for slot in slots]
    await until(lambda: len(wire.transfers) == 2)
    assert [len(decode_payloads(wire)) for wire in call.written] == [2], "headers go together"
    assert free(staging) == SLOTS - 2
    for i, transfer in enumerate(wire.transfers):
        transfer.reach()
        await sent[i]
    assert free(staging) == SLOTS


@pytest.mark.parametrize("when", ["its pump has ended", "its pump waits for more"])
async def test_a_broken_link_gives_a_slot_back_when_it_has_been_filled(
    link: OutboundLink, call: Call, staging: Staging, when: str
) -> None:
    """The abort may have been long ago, and the copy into the slot still be under way."""
    wire: Any = link.link
    if when == "its pump has ended":
        link._pump.cancel()
        await asyncio.sleep(0.01)
    else:
        call.open.set()
        wire.abort("gone")
    wire._aborting.set_result(None)
    filling = Point()
    sent = link.send(PAYLOAD, await link.staging.take(SIZE), filling)
    await asyncio.sleep(0.02)
    assert free(staging) == SLOTS - 1 and not sent.done()
    filling.reach()
    with pytest.raises(HandoffRefused):
        await sent
    assert free(staging) == SLOTS


async def test_what_may_be_leaving_is_free_after_the_abort_too(
    link: OutboundLink, call: Call, staging: Staging
) -> None:
    wire: Any = link.link
    filled, filling = Point(), Point()
    filled.reach()
    call.fails = True
    sent = [link.send(PAYLOAD, await link.staging.take(SIZE), fence) for fence in (filled, filling)]
    call.open.set()
    await until(lambda: bool(wire.broken))
    await asyncio.sleep(0.01)
    assert free(staging) == SLOTS - 2
    wire._aborting.set_result(None)
    await until(lambda: free(staging) == SLOTS - 1)
    filling.reach()
    await until(lambda: free(staging) == SLOTS)
    assert all(isinstance(each.exception(), HandoffRefused) for each in sent)


@pytest.fixture
async def staged(call: Call, staging: Staging) -> StagedOutbound:
    return StagedOutbound(call, SIZE, staging, Milestones("test"), lambda: None)


async def test_a_peer_that_reads_nothing_holds_up_the_next_payloads(
    staged: StagedOutbound, call: Call, staging: Staging
) -> None:
    for _ in range(SLOTS):
        await staged.send_blocks(RUN, await staged.buffer(SIZE), 1, None)
    more = asyncio.create_task(staged.buffer(SIZE))
    await asyncio.sleep(0.02)
    assert not more.done()
    call.open.set()
    async with asyncio.timeout(5):
        staged.discard(await more)
        assert await staged.flush() == 0
    assert len(call.written) == SLOTS
    await until(lambda: free(staging) == SLOTS)


@pytest.mark.parametrize("end", ["a write fails", "cancelled before it began"])
async def test_staged_payloads_that_do_not_leave_free_their_slots(
    staged: StagedOutbound, call: Call, staging: Staging, end: str
) -> None:
    if end == "a write fails":
        call.fails = True
        call.open.set()
        with pytest.raises(HandoffRefused):
            for _ in range(3 * SLOTS):
                await staged.send_blocks(RUN, await staged.buffer(SIZE), 1, None)
                await asyncio.sleep(0)
            await staged.flush()
    else:
        await staged.send_blocks(RUN, await staged.buffer(SIZE), 1, None)
    staged.cancel()
    async with asyncio.timeout(5):
        await until(lambda: free(staging) == SLOTS)
