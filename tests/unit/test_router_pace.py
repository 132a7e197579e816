"""Tokens gather when the event loop falls behind, and only then."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from cluster import pace as module
from cluster.pace import LATE_SECONDS, MAX_SECONDS, STEP_SECONDS, Pace
from router.buffer import OutputBuffer
from router.output import Delta


def test_it_grows_while_the_loop_is_late_and_ends_soon_after() -> None:
    pace = Pace()
    pace.see(LATE_SECONDS / 2)
    assert pace.seconds == 0.0
    for _ in range(100):
        pace.see(10 * LATE_SECONDS)
    assert pace.seconds == MAX_SECONDS
    for _ in range(30):
        pace.see(0.0)
    assert pace.seconds == 0.0


async def test_the_loop_is_watched_while_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.001)
    pace = Pace()
    assert not pace.watching
    assert pace.ask() == 0.0 and pace.watching
    time.sleep(0.05)  # noqa: ASYNC251 - what a late loop is late by
    async with asyncio.timeout(30):
        while not pace.seconds:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert pace.seconds >= STEP_SECONDS / 2
    monkeypatch.setattr(module, "LATE_SECONDS", math.inf)  # whatever else this machine does
    async with asyncio.timeout(30):
        while pace.watching:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert pace.seconds == 0.0
    pace.ask()
    assert pace.watching


async def test_the_first_delta_never_waits_and_later_ones_gather() -> None:
    pace = Pace()
    pace.seconds = 0.4
    buffer = OutputBuffer(pace=pace)
    buffer.put(Delta(0, 0, (1,), "a"))
    async with asyncio.timeout(0.3):  # a wait would be longer
        assert [d.token_ids for d in await buffer.take()] == [(1,)]
    taking = asyncio.create_task(buffer.take())
    for i in range(1, 5):
        buffer.put(Delta(0, i, (i + 1,), "b"))
        await asyncio.sleep(0)
    assert [(d.offset, d.token_ids) for d in await taking] == [(1, (2, 3, 4, 5))]


async def test_without_load_every_delta_goes_at_once() -> None:
    buffer = OutputBuffer(pace=Pace())
    for i in range(3):
        buffer.put(Delta(0, i, (i,), "a"))
        assert [d.token_ids for d in await buffer.take()] == [(i,)]


async def test_deltas_that_come_slower_than_the_pace_do_not_wait() -> None:
    pace = Pace()
    pace.seconds = 0.001
    buffer = OutputBuffer(pace=pace)
    sent: list[tuple[int, ...]] = []
    buffer.direct = lambda delta: not sent.append(delta.token_ids)
    taken: list[tuple[int, ...]] = []

    async def taker() -> None:
        while True:
            taken.extend([delta.token_ids for delta in await buffer.take()])

    taking = asyncio.create_task(taker())
    for i in range(4):
        buffer.put(Delta(0, i, (i,), "a"))
        await asyncio.sleep(0.02)
    taking.cancel()
    assert taken == [(0,)]  # nobody knew then how they come
    assert sent == [(1,), (2,), (3,)]
