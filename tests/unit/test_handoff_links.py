"""A push whose payloads come over a link, without a device: what it sees, in which order, and that
every slot is free again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.transport.checksums import DeviceSum, Tally, seed_of, value
from cluster.kv.transport.frames import Blocks, Commit
from tests.handoff.fake_links import HANDOFF, LINK, SIZE, SLOTS, Bench, FakeLink


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.open()
    yield bench
    bench.inbound.close()
    assert bench.all_slots_free()


async def test_a_commit_comes_behind_the_payloads_it_counts(bench: Bench) -> None:
    """Its stream is faster than the link."""
    commit = Commit(3, 42, 12)
    await bench.arrive(0)
    bench.push.frames.put_nowait(commit)
    first = await bench.next()
    assert isinstance(first, Blocks) and first.run.sequence == 0
    bench.inbound.done(first)
    waiting = asyncio.create_task(bench.next())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await bench.arrive(1)
    await bench.arrive(2)
    second, third = await waiting, await bench.next()
    assert isinstance(second, Blocks) and isinstance(third, Blocks)
    assert [second.run.sequence, third.run.sequence] == [1, 2]
    bench.inbound.done(second)
    bench.inbound.done(third)
    assert await bench.next() == commit
    assert bench.inbound.transport == "nccl"


async def test_an_empty_handoff_commits_at_once(bench: Bench) -> None:
    bench.push.frames.put_nowait(Commit(0, 42, 12))
    assert await bench.next() == Commit(0, 42, 12)


async def test_payloads_keep_their_order_and_their_bytes(bench: Bench) -> None:
    for sequence in range(SLOTS):
        await bench.arrive(sequence)
    for sequence in range(SLOTS):
        blocks = await bench.next()
        assert isinstance(blocks, Blocks) and blocks.run.sequence == sequence
        assert set(blocks.payload.tolist()) == {sequence}
        bench.inbound.done(blocks)


async def test_another_handoffs_payload_is_dropped_and_its_slot_freed(bench: Bench) -> None:
    for _ in range(3 * SLOTS):
        await bench.arrive(0, handoff_id="b" * 32)
        await asyncio.sleep(0)
    await bench.arrive(0)
    blocks = await bench.next()
    assert isinstance(blocks, Blocks)
    bench.inbound.done(blocks)


async def test_what_was_not_taken_is_freed_with_the_push(bench: Bench) -> None:
    await bench.arrive(0)
    await bench.arrive(1)
    assert bench.link.slots.free == SLOTS - 2
    bench.inbound.close()
    assert bench.all_slots_free()
    await bench.arrive(2)  # too late: it has no owner
    assert bench.all_slots_free()


async def test_a_sender_waits_until_a_slot_has_been_read(bench: Bench) -> None:
    for sequence in range(SLOTS):
        await bench.arrive(sequence)
    more = asyncio.create_task(bench.arrive(SLOTS))
    await asyncio.sleep(0.01)
    assert not more.done()
    blocks = await bench.next()
    assert isinstance(blocks, Blocks)
    bench.inbound.done(blocks)
    await more


@pytest.mark.parametrize(
    ("index", "size", "reason"),
    [
        (SLOTS, SIZE, "in no slot"),
        (-1, SIZE, "in no slot"),
        (SLOTS - 1, SIZE + 1, "in no slot"),
        (0, 0, "in no slot"),
        (1, SIZE, "in use"),
        (0, SIZE + 1, "in use"),
    ],
)
async def test_a_payload_that_lies_where_none_can(
    bench: Bench, index: int, size: int, reason: str
) -> None:
    bench.link.slots.hold(1, SIZE)
    with pytest.raises(HandoffRefused, match=reason):
        bench.link.slots.hold(index, size)
    bench.link.slots.give_back(1)
    with pytest.raises(HandoffRefused, match="not in use"):
        bench.link.slots.give_back(1)


async def test_memory_is_given_up_when_a_link_is_down_and_nobody_uses_a_slot() -> None:
    link = FakeLink()
    waiting = [asyncio.create_task(link.slots.take(SIZE)) for _ in range(SLOTS + 2)]
    await asyncio.sleep(0.01)
    taken = [task.result() for task in waiting if task.done()]
    assert len(taken) == SLOTS
    link.abort("gone")
    late = [task for task in waiting if not task.done()]
    for task in late:
        with pytest.raises(HandoffRefused, match="gone"):
            await task
    with pytest.raises(HandoffRefused, match="gone"):
        await link.slots.take(SIZE)
    for slot in taken:
        assert not link.unused
        link.slots.give_back(slot.index)
    assert link.unused == 1
    with pytest.raises(HandoffRefused, match="gone"):
        await link.slots.take(SIZE)


async def test_a_wait_that_is_broken_off_loses_no_payload(bench: Bench) -> None:
    """Broken off in every turn of the loop in which the payload may be on its way to it."""
    for turns in range(6):
        waiting = asyncio.create_task(bench.inbound.receive())
        await asyncio.sleep(0)
        await bench.arrive(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            blocks = await waiting
            assert isinstance(blocks, Blocks)
            bench.inbound.done(blocks)
    bench.inbound.close()
    assert bench.all_slots_free()


async def test_a_commit_is_told_once(bench: Bench) -> None:
    """Whoever reads on, as after a refusal, waits for the peer and does not spin."""
    bench.push.frames.put_nowait(Commit(0, 42, 12))
    assert await bench.next() == Commit(0, 42, 12)
    more = asyncio.create_task(bench.inbound.receive())
    await asyncio.sleep(0.01)
    assert not more.done()
    bench.push.frames.put_nowait(None)
    assert await more is None


async def test_the_end_of_a_push_is_heard_while_payloads_are_awaited(bench: Bench) -> None:
    bench.push.frames.put_nowait(None)
    assert await bench.next() is None


async def test_a_malformed_frame_is_reported_once(bench: Bench) -> None:
    """And what comes behind it is still read, so that a refusal reaches its sender."""
    bench.push.frames.put_nowait(HandoffRefused("a frame has no kind"))
    with pytest.raises(HandoffRefused, match="no kind"):
        await bench.next()
    bench.push.frames.put_nowait(None)
    assert await bench.next() is None


async def test_payloads_on_both_ways_are_refused(bench: Bench) -> None:
    run = BlockRun(0, 0, 1, 0, 1)
    bench.push.frames.put_nowait(Blocks(run, torch.zeros(SIZE, dtype=torch.uint8)))
    with pytest.raises(HandoffRefused, match="with the frames and over a link"):
        await bench.next()


async def test_a_push_over_a_link_that_is_down_is_refused() -> None:
    bench = Bench()
    bench.links._links.clear()
    with pytest.raises(HandoffRefused, match="link that payloads are to come over is down"):
        await bench.open()


@pytest.mark.parametrize(
    "damage", ["none", "a payload", "an unsummed payload", "the sum", "another handoff's"]
)
async def test_the_checksum_of_what_was_sampled_is_checked(bench: Bench, damage: str) -> None:
    seed = seed_of("f" * 32 if damage == "another handoff's" else HANDOFF)
    sent = DeviceSum(torch.device("cpu"), None, seed)
    for sequence in (0, 2):
        Tally(sent, sequence).count(torch.full((SIZE,), sequence, dtype=torch.uint8))
    for sequence in range(3):
        await bench.arrive(sequence, summed=sequence != 1)
    for sequence in range(3):
        blocks = await bench.next()
        assert isinstance(blocks, Blocks)
        if (damage, sequence) in {("a payload", 2), ("an unsummed payload", 1)}:
            blocks.payload[5] ^= 4
        tally = bench.inbound.verify(blocks, seed)
        assert (tally is None) == (sequence == 1)
        if tally is not None:
            tally.count(blocks.payload)
        bench.inbound.done(blocks)
    checksum = value(sent.fetch()) + (damage == "the sum")
    commit = Commit(3, 42, 12, checksum)
    if damage in ("none", "an unsummed payload"):
        await bench.inbound.judge(commit)
    else:
        with pytest.raises(HandoffRefused, match="checksum differs"):
            await bench.inbound.judge(commit)


async def test_a_checksum_of_nothing_is_refused(bench: Bench) -> None:
    await bench.inbound.judge(Commit(0, 42, 12))
    with pytest.raises(HandoffRefused, match="checksum differs"):
        await bench.inbound.judge(Commit(0, 42, 12, 1))


async def test_when_a_link_breaks_its_pushes_hear_of_it(bench: Bench) -> None:
    _, claim = bench.links.claim(LINK, HANDOFF)
    claim.put_nowait(None)  # what `serve` does at a link's end
    with pytest.raises(HandoffRefused, match="the link broke"):
        await bench.next()
