"""Results of a handoff's ranks, joined."""

from __future__ import annotations

import asyncio

import pytest

from cluster.engine.results import HandoffResults
from cluster.kv.handoff import HandoffResult


def part(handoff_id: str = "h", error: str = "", size: int = 10) -> HandoffResult:
    return HandoffResult(handoff_id, "decode", error, bytes=size, frames=1, ended_at=float(size))


def expecting(ranks: int) -> HandoffResults:
    results = HandoffResults(ranks)
    results.expect("h")
    return results


async def test_every_rank_counts() -> None:
    results = expecting(ranks=2)
    results.add(part(size=10))
    waiting = asyncio.create_task(results.wait("h"))
    await asyncio.sleep(0)
    assert not waiting.done()
    results.add(part(size=30))
    joined = await waiting
    assert (joined.bytes, joined.frames, joined.ended_at, joined.ok) == (40, 2, 30.0, True)


async def test_one_rank_that_fails_ends_the_wait() -> None:
    results = expecting(ranks=2)
    waiting = asyncio.create_task(results.wait("h"))
    await asyncio.sleep(0)
    results.add(part(error="checksum differs"))
    assert (await waiting).error == "checksum differs"


async def test_a_result_may_come_before_the_question() -> None:
    results = expecting(ranks=1)
    results.add(part())
    assert (await results.wait("h")).ok


async def test_what_nobody_expects_is_not_kept() -> None:
    results = expecting(ranks=1)
    for i in range(10_000):
        results.add(part(handoff_id=str(i)))
    results.add(part())
    results.forget("h")
    results.add(part())
    assert len(results) == 0
    with pytest.raises(KeyError):
        await results.wait("h")
