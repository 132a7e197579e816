"""The worker's way out to a router: what gathers goes as one message, in order, within bounds."""

from __future__ import annotations

import asyncio

import pytest

from cluster.engine.blocks import HeldBlocks
from cluster.errors import EngineFailed, Overloaded
from cluster.pace import Pace
from cluster.worker.blocks import BlockChanges, BlockReporter
from cluster.worker.outbox import MAX_STEPS, Outbox
from cluster.worker.sequence import SequenceStep


async def test_steps_of_a_sequence_that_wait_become_one() -> None:
    outbox = Outbox(Pace())
    for i in range(4):
        outbox.put(SequenceStep("a", i, [10 + i], f"{i}"))
        if i % 2:
            outbox.put(SequenceStep("b", i // 2, [20 + i], "x"))
    outbox.put(SequenceStep("a", 4, [14], "4", finish_reason="length"))
    steps, blocks = await outbox.take()
    a, b = steps
    assert (a.offset, a.token_ids, a.text) == (0, [10, 11, 12, 13, 14], "01234")
    assert a.finish_reason == "length"
    assert (b.offset, b.token_ids, b.finish_reason, blocks) == (0, [21, 23], None, None)


async def test_a_late_loop_lets_steps_gather_and_a_first_token_waits_for_none() -> None:
    pace = Pace()
    pace.seconds = 1000.0
    outbox = Outbox(pace)
    outbox.put(SequenceStep("a", 5, [15]))
    taking = asyncio.create_task(outbox.take())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not taking.done()
    outbox.put(SequenceStep("a", 6, [16]))
    outbox.put(SequenceStep("b", 0, [20]))
    (a, b), _ = await taking
    assert (a.token_ids, b.token_ids) == ([15, 16], [20])

    pace.seconds = 0.001
    outbox.put(SequenceStep("a", 7, [17]))
    (a,), _ = await outbox.take()
    assert a.token_ids == [17]


async def test_a_failure_keeps_the_tokens_before_it_and_its_error() -> None:
    outbox = Outbox(Pace())
    error = EngineFailed("gone")
    outbox.put(SequenceStep("a", 7, [1], "t"))
    outbox.put(SequenceStep("a", 0, [], finish_reason="error", error=error))
    (tokens, failure), _ = await outbox.take()
    assert (tokens.offset, tokens.token_ids, tokens.error) == (7, [1], None)
    assert failure.error is error


async def test_a_router_that_does_not_read_is_given_up() -> None:
    outbox = Outbox(Pace())
    for i in range(MAX_STEPS):
        outbox.put(SequenceStep("a", i, [1]))
    with pytest.raises(Overloaded):
        outbox.put(SequenceStep("a", MAX_STEPS, [1]))
    failed = SequenceStep("a", 0, [], finish_reason="error", error=Overloaded("not read"))
    outbox.put(failed)  # or a router that reads again would wait for it until the deadline
    (tokens, last), _ = await outbox.take()
    assert len(tokens.token_ids) == MAX_STEPS and last is failed


async def test_a_router_is_told_all_blocks_first_and_then_the_changes() -> None:
    held, told = HeldBlocks(), list[BlockChanges]()
    held.change([1, 2], [])
    task = asyncio.create_task(BlockReporter(held, told.append).run())
    while len(told) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    held.change([3], [1])
    held.change([1], [3])
    while len(told) < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    task.cancel()
    reset, whole, change = told
    assert reset == BlockChanges(True, b"", b"")
    assert sorted(numbers(whole.stored)) == [1, 2] and not whole.removed
    assert (numbers(change.stored), numbers(change.removed)) == ([1], [3])


def numbers(packed: bytes) -> list[int]:
    return [int.from_bytes(packed[i : i + 8], "little") for i in range(0, len(packed), 8)]
