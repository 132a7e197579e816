"""Slots of links' and of staging memory: each is free again once, and not before its last copy is
done, or its payload has been read."""

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
from cluster.kv.transport.hello import Payload, decode_payloads, encode_link_reply
from cluster.kv.transport.link import Link
from cluster.kv.transport.link_slots import LinkSlots
from cluster.kv.transport.outbound_links import OutboundLink, _Leaving
from cluster.kv.transport.staging import Slot, Staging
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Seal
from tests.unit.test_milestones import Point, until

SIZE, SLOTS = 64, 4
RUN = BlockRun(0, 0, 1, 0, 1)


def payload(slot: Slot) -> Payload:
    return Payload("a" * 32, RUN, SIZE, False, slot.index)


@pytest.fixture
def staging() -> Staging:
    return Staging(torch.device("cpu"), SLOTS * SIZE, SIZE)


def free(staging: Staging) -> int:
    return staging._free.qsize()


class Call:
    """A stream whose writes pass when the test lets them, or fail."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.fails = self.cancelled = False
        self.open = asyncio.Event()
        self.told: asyncio.Queue[bytes | None] = asyncio.Queue()

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

    async def receive_whole(self) -> bytes | None:
        return await self.told.get()

    def cancel(self) -> None:
        self.cancelled = True


class Wire(Link):
    """A link without a device: a transfer is over when the test says so."""

    def __init__(self, puts: bool) -> None:
        self.broken = ""
        self.puts = puts
        self.refuses = False
        self.stuck_seconds = 600.0
        self.unused = 0
        self._milestones = Milestones("test")
        self._aborting = None
        self._when_down = []
        self._slots = LinkSlots(torch.zeros(SLOTS, SIZE, dtype=torch.uint8), self._gone)
        self.transfers: list[Point] = []

    def _gone(self) -> None:
        self.unused += 1

    def put(self, slot: Any, filled: Any) -> Point:
        if self.refuses:
            raise RuntimeError("CUDA error")
        self.transfers.append(Point())
        return self.transfers[-1]

    async def send(self, slot: Any, filled: Any) -> Point:
        self._raise_if_broken()
        self.transfers.append(Point())
        return self.transfers[-1]

    def abort(self, reason: str) -> None:
        if not self.broken:
            self.broken = reason
            self._aborting = asyncio.get_running_loop().create_future()
            self.slots.close(reason)
            for down in self._when_down:
                down()


@pytest.fixture
async def call() -> Call:
    return Call()


@pytest.fixture(params=[True, False], ids=["puts", "kernels"])
async def link(call: Call, request: pytest.FixtureRequest) -> AsyncIterator[OutboundLink]:
    made = OutboundLink(1, call, Wire(request.param))  # type: ignore[arg-type]
    yield made
    made.close("over")


async def leave(link: OutboundLink, filled: Any = None) -> tuple[Slot, asyncio.Future[None]]:
    slot = await link.link.slots.take(SIZE)
    return slot, link.send(payload(slot), slot, filled)


async def test_a_slot_is_free_when_the_peer_has_read_it(link: OutboundLink, call: Call) -> None:
    wire: Any = link.link
    call.open.set()
    (first, sent), (second, also) = [await leave(link) for _ in range(2)]
    await until(lambda: len(wire.transfers) == 2)
    assert bool(call.written) == (not wire.puts), "ahead, or once it is there"
    for transfer in wire.transfers:
        transfer.reach()
    await sent
    await also
    told = [found for written in call.written for found in decode_payloads(written)]
    assert [found.slot for found in told] == [first.index, second.index]
    assert wire.slots.free == SLOTS - 2
    call.told.put_nowait(encode_link_reply(free=[second.index]))
    await until(lambda: wire.slots.free == SLOTS - 1)
    call.told.put_nowait(encode_link_reply(free=[first.index]))
    await until(lambda: wire.slots.free == SLOTS)
    assert not wire.broken


async def test_headers_of_all_that_is_as_far_go_together(link: OutboundLink, call: Call) -> None:
    wire: Any = link.link
    sent = [(await leave(link))[1] for _ in range(SLOTS)]
    if wire.puts:
        await until(lambda: len(wire.transfers) == SLOTS)
        for transfer in wire.transfers[:-1]:
            transfer.reach()
    await asyncio.sleep(0.02)
    call.open.set()
    await until(lambda: len(wire.transfers) == SLOTS and bool(call.written))
    wire.transfers[-1].reach()
    await until(lambda: sum(len(decode_payloads(each)) for each in call.written) == SLOTS)
    assert len(call.written) <= 1 + wire.puts
    for transfer in wire.transfers[:-1]:
        transfer.reach()
    await asyncio.gather(*sent)


@pytest.mark.parametrize(
    ("link", "index"),
    [(True, 0), (True, 1), (True, SLOTS), (False, 1), (False, SLOTS)],
    ids=["put, on its way", "put, not in use", "put, none", "sent, not in use", "sent, none"],
    indirect=["link"],
)
async def test_a_peer_that_has_read_what_it_was_not_told_of(
    link: OutboundLink, call: Call, index: int
) -> None:
    wire: Any = link.link
    slot, sent = await leave(link)
    assert slot.index == 0
    call.told.put_nowait(encode_link_reply(free=[index]))
    await until(lambda: bool(wire.broken))
    assert "not told of" in wire.broken and wire.slots.free < SLOTS
    wire._aborting.set_result(None)
    with pytest.raises(HandoffRefused):
        await sent
    await until(lambda: wire.slots.free == SLOTS and wire.unused == 1)


async def test_what_has_been_read_is_not_filled_anew_before_it_has_left(
    link: OutboundLink, call: Call
) -> None:
    """A peer's word for it may come early; twice it may not."""
    wire: Any = link.link
    _, sent = await leave(link)
    if wire.puts:
        await until(lambda: bool(wire.transfers))
        wire.transfers[0].reach()
    await until(lambda: link._under_way[0].announced)
    call.told.put_nowait(encode_link_reply(free=[0]))
    await until(lambda: call.told.empty())
    await asyncio.sleep(0.01)
    assert wire.slots.free == SLOTS - 1 and not wire.broken
    call.open.set()
    await until(lambda: bool(wire.transfers))
    wire.transfers[0].reach()
    await sent
    await until(lambda: wire.slots.free == SLOTS)
    call.told.put_nowait(encode_link_reply(free=[0]))
    await until(lambda: bool(wire.broken))
    assert "not told of" in wire.broken


async def test_a_peer_that_says_twice_that_it_has_read(link: OutboundLink, call: Call) -> None:
    wire: Any = link.link
    link._under_way[0] = leaving = _Leaving(
        payload(await wire.slots.take(SIZE)),
        Slot(0, torch.zeros(SIZE, dtype=torch.uint8)),
        None,
        asyncio.get_running_loop().create_future(),
        announced=True,
    )
    leaving.sent.add_done_callback(lambda _: leaving.sent.exception())
    call.told.put_nowait(encode_link_reply(free=[0, 0]))
    await until(lambda: bool(wire.broken))
    assert "not told of" in wire.broken and wire.slots.free == SLOTS - 1
    wire._aborting.set_result(None)
    await until(lambda: wire.slots.free == SLOTS and wire.unused == 1)


async def test_a_link_whose_peer_reads_nothing_ends(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every push over it would wait for a slot until its lease is over, and the next one, too."""
    monkeypatch.setattr("cluster.kv.transport.outbound_links.WATCH_SECONDS", 0.001)
    wire = Wire(True)
    wire.stuck_seconds = 0.02
    call.open.set()
    link = OutboundLink(1, call, wire)  # type: ignore[arg-type]
    await asyncio.sleep(0.1)
    assert not wire.broken, "nobody owes anything"
    await leave(link)
    await until(lambda: bool(wire.transfers))
    wire.transfers[0].reach()
    async with asyncio.timeout(30):
        await until(lambda: bool(wire.broken))
    assert "reads nothing" in wire.broken and call.cancelled


async def test_a_put_that_the_device_refuses_ends_the_link(call: Call) -> None:
    wire: Any = Wire(True)
    wire.refuses = True
    link = OutboundLink(1, call, wire)  # type: ignore[arg-type]
    _, sent = await leave(link)
    assert "could not be put: CUDA error" in wire.broken and call.cancelled
    wire._aborting.set_result(None)
    with pytest.raises(HandoffRefused):
        await sent
    await until(lambda: wire.slots.free == SLOTS and wire.unused == 1)


async def test_a_payload_takes_slots_in_a_row_and_whoever_waits_is_served_in_turn() -> None:
    slots = LinkSlots(torch.arange(SLOTS * SIZE, dtype=torch.uint8).view(SLOTS, SIZE), lambda: None)
    assert slots.largest == SLOTS // 2 * SIZE
    first, second = await slots.take(SIZE), await slots.take(SIZE + 1)
    assert (first.index, second.index, slots.free) == (0, 1, 1)
    assert second.payload.tolist() == list(range(SIZE, 2 * SIZE + 1))
    large, small, gone = (
        asyncio.create_task(slots.take(size)) for size in (2 * SIZE, SIZE, SLOTS * SIZE)
    )
    await asyncio.sleep(0)
    slots.give_back(first.index)  # two are free, and not in a row
    await asyncio.sleep(0)
    assert not large.done() and not small.done(), "the large one is not passed over"
    with pytest.raises(ValueError, match="a payload of"):
        await slots.take(SLOTS * SIZE + 1)
    large.cancel()
    await asyncio.sleep(0.01)
    assert (await small).index == 0
    slots.give_back(second.index)
    gone.cancel()
    await asyncio.sleep(0)
    again = await slots.take(3 * SIZE)
    assert again.index == 1 and slots.free == 0
    late = asyncio.create_task(slots.take(SIZE))
    await asyncio.sleep(0)
    slots.give_back(again.index)
    late.cancel()  # it has been given its slot, and does not know yet
    await asyncio.sleep(0.01)
    assert slots.free == 3


async def test_with_a_link_ends_its_stream(link: OutboundLink, call: Call) -> None:
    """Else the peer keeps its end until there is something to send again."""
    link.link.abort("a transfer over the link stood still")
    assert call.cancelled


@pytest.mark.parametrize("when", ["it waits for more", "it waits for the peer", "it is long down"])
async def test_a_broken_link_gives_a_slot_back_when_it_has_been_filled_and_the_abort_is_over(
    link: OutboundLink, call: Call, when: str
) -> None:
    wire: Any = link.link
    call.open.set()
    slot = await wire.slots.take(SIZE)
    filling = Point()
    if when == "it is long down":
        wire.abort("gone")
        wire._aborting.set_result(None)
        await asyncio.sleep(0.01)
    sent = link.send(payload(slot), slot, filling)
    if when == "it waits for the peer":
        await until(lambda: bool(wire.transfers))
    if when != "it is long down":
        wire.abort("gone")
        for transfer in wire.transfers:
            transfer.reach()
        wire._aborting.set_result(None)
    await asyncio.sleep(0.02)
    assert wire.slots.free == SLOTS - 1 and not wire.unused
    assert not sent.done() or when == "it waits for the peer"
    filling.reach()
    with pytest.raises(HandoffRefused):
        await sent
    await until(lambda: wire.slots.free == SLOTS and wire.unused == 1)


async def test_what_may_be_leaving_is_free_after_the_abort_only(
    link: OutboundLink, call: Call
) -> None:
    """Announced or not, read or not: nobody tells any more."""
    wire: Any = link.link
    filled, filling = Point(), Point()
    filled.reach()
    call.fails = True
    sent = [(await leave(link, fence))[1] for fence in (filled, filling)]
    if wire.puts:
        await until(lambda: len(wire.transfers) == 2)
        wire.transfers[0].reach()
    call.open.set()
    await until(lambda: bool(wire.broken))
    await asyncio.sleep(0.01)
    assert wire.slots.free == SLOTS - 2
    wire._aborting.set_result(None)
    await until(lambda: wire.slots.free == SLOTS - 1)
    filling.reach()
    await until(lambda: wire.slots.free == SLOTS and wire.unused == 1)
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
    async with asyncio.timeout(30):
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
    async with asyncio.timeout(30):
        await until(lambda: free(staging) == SLOTS)
