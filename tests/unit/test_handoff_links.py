"""A push whose payloads come over a link, without a device: what it sees, in which order, and that
every slot is free again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.transport.checksums import device_checksum
from cluster.kv.transport.frames import Blocks, Commit
from tests.handoff.fake_links import HANDOFF, LINK, SIZE, SLOTS, Bench


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.open()
    yield bench
    bench.inbound.close()
    await bench.all_slots_free()


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
    assert bench.staging._free.qsize() == SLOTS - 2
    bench.inbound.close()
    await bench.all_slots_free()
    await bench.arrive(2)  # too late: it has no owner
    await bench.all_slots_free()


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


async def test_a_sampled_checksum_is_checked(bench: Bench) -> None:
    seed = 99
    right = device_checksum(torch.zeros(SIZE, dtype=torch.uint8), seed)
    await bench.arrive(0, checksum=right)
    await bench.arrive(1, checksum=right)  # its payload is another
    for damaged in (False, True):
        blocks = await bench.next()
        assert isinstance(blocks, Blocks)
        if damaged:
            with pytest.raises(HandoffRefused, match="frame 1: checksum differs"):
                await bench.inbound.verify(blocks, seed)
        else:
            await bench.inbound.verify(blocks, seed)
        bench.inbound.done(blocks)


def test_a_device_checksum_sees_every_byte_and_their_order() -> None:
    payload = torch.arange(103, dtype=torch.uint8)
    right = device_checksum(payload, 5)
    assert right and device_checksum(payload.clone(), 5) == right
    assert device_checksum(payload, 6) != right
    for at in range(len(payload)):
        changed = payload.clone()
        changed[at] ^= 1
        assert device_checksum(changed, 5) != right
    swapped = payload.clone()
    swapped[0:4], swapped[4:8] = payload[4:8], payload[0:4]
    assert device_checksum(swapped, 5) != right


async def test_when_a_link_breaks_its_pushes_hear_of_it(bench: Bench) -> None:
    claim = bench.links.claim(LINK, HANDOFF)
    claim.put_nowait(None)  # what `serve` does at a link's end
    with pytest.raises(HandoffRefused, match="the link broke"):
        await bench.next()
