"""What a device has done is told on the loop, in order, without the loop waiting for the device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cluster.kv import milestones
from cluster.kv.milestones import Milestones


class Point:
    """A fence that the test lets pass."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self._error: RuntimeError | None = None

    def reach(self, error: RuntimeError | None = None) -> None:
        self._error = error
        self._passed.set()

    def query(self) -> bool:
        if self._error is not None:
            raise self._error
        return self._passed.is_set()

    def synchronize(self) -> None:
        if not self._passed.wait(10):
            raise RuntimeError("nobody reached it")
        if self._error is not None:
            raise self._error


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - a thread makes it true
        await asyncio.sleep(0.001)


async def test_no_fence_and_a_reached_one_need_no_thread() -> None:
    along = Milestones("needless")
    point = Point()
    point.reach()
    await along.reached(None)
    await along.reached(point)
    assert "needless" not in {thread.name for thread in threading.enumerate()}


async def test_fences_are_told_in_their_order_while_the_loop_runs() -> None:
    along, points, heard = Milestones("test"), [Point() for _ in range(5)], list[int]()
    for i, point in enumerate(points):
        along.then(point, lambda _, i=i: heard.append(i))  # type: ignore[misc]
    points[3].reach()  # a stream's later points are reached later, but its thread need not know
    await asyncio.sleep(0.02)
    assert heard == []
    for point in (points[0], points[1], points[2]):
        point.reach()
    async with asyncio.timeout(30):
        await along.reached(points[2])
        await until(lambda: len(heard) == 4)
        assert heard == [0, 1, 2, 3]
        points[4].reach()
        await until(lambda: len(heard) == 5)


async def test_a_device_that_fails_is_heard_of() -> None:
    along, first, second = Milestones("test"), Point(), Point()
    waiting = [asyncio.create_task(along.reached(point)) for point in (first, second)]
    await asyncio.sleep(0.01)
    second.reach(RuntimeError("an illegal address"))
    first.reach()
    async with asyncio.timeout(30):
        await waiting[0]
        with pytest.raises(RuntimeError, match="illegal address"):
            await waiting[1]
        with pytest.raises(RuntimeError, match="illegal address"):
            await along.reached(second)


async def test_who_gave_up_waiting_is_not_told() -> None:
    along, point, other = Milestones("test"), Point(), Point()
    amiss: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: amiss.append(context))
    waiting = asyncio.create_task(along.reached(point))
    late = asyncio.create_task(along.reached(other))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.sleep(0)
    other.reach()
    point.reach()
    async with asyncio.timeout(30):
        await late
    assert amiss == []


async def test_one_who_stumbles_keeps_the_others_from_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    along, first, second = Milestones("test"), Point(), Point()

    def stumble(_: Exception | None) -> None:
        raise KeyError("x")

    along.then(first, stumble)
    late = asyncio.create_task(along.reached(second))
    await asyncio.sleep(0.01)
    second.reach()
    first.reach()
    async with asyncio.timeout(30):
        await late
    assert "was not taken in" in caplog.text


async def test_the_thread_ends_when_idle_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milestones, "IDLE_SECONDS", 0.02)
    along = Milestones("idle-test")

    def running() -> bool:
        return any(thread.name == "idle-test" for thread in threading.enumerate())

    async with asyncio.timeout(30):
        for _ in range(3):
            point = Point()
            waiting = asyncio.create_task(along.reached(point))
            await asyncio.sleep(0.01)
            assert running()
            point.reach()
            await waiting
            await until(lambda: not running())
