"""A router's part in batch jobs, without a store: what it takes in hand, and lines that break."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from cluster.clock import SystemClock
from cluster.config_clients import BatchConfig
from cluster.store.batch_records import BatchJob, Page
from cluster.store.batches import PAGE_LINES
from router.batch import runner
from router.batch.runner import BatchRunner
from router.batch.serve import LineServer
from router.tenants import Tenant

JOB = BatchJob("b-0", "t", "/v1/completions", "in_progress", 64, 1.0, 1e12)


class Batches:
    """Jobs whose pages are free until they are claimed; settled ones are gone."""

    def __init__(self, jobs: int) -> None:
        self.jobs = [replace(JOB, batch_id=f"b-{i}") for i in range(jobs)]
        self.free = {job.name: deque(range(JOB.total // PAGE_LINES)) for job in self.jobs}
        self.mine: set[tuple[str, int]] = set()
        self.settled: list[tuple[str, int, bool]] = []
        self.written: list[str] = []

    async def active(self) -> list[BatchJob]:
        return self.jobs

    async def claim(self, job: BatchJob, *_: object) -> Page | None:
        if not self.free[job.name]:
            return None
        page = self.free[job.name].popleft()
        self.mine.add((job.name, page))
        return Page(page, tuple(range(page * PAGE_LINES, (page + 1) * PAGE_LINES)))

    async def renew(self, job: BatchJob, *given: Any) -> set[int]:
        return {page for page in given[-1] if (job.name, page) in self.mine}

    async def lines(self, *_: object) -> list[str]:
        return ["{}"] * PAGE_LINES

    async def write_result(self, job: BatchJob, line: int, result: str, failed: bool) -> bool:
        self.written.append(result)
        return True

    async def settle(self, job: BatchJob, owner: str, page: int, now: float, done: bool) -> bool:
        self.settled.append((job.name, page, done))
        return False

    async def ended_before(self, *_: object) -> list[BatchJob]:
        return []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.001)


async def until(true: Any) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_many_jobs_are_no_reason_for_more_lines_at_once() -> None:
    async def serve(*_: object) -> tuple[str, bool]:
        await asyncio.Event().wait()
        return "", False

    batches, config = Batches(8), BatchConfig(max_running_lines=3 * PAGE_LINES)
    mine = BatchRunner(config, batches, serve, "r-0", SystemClock())  # type: ignore[arg-type]
    running = asyncio.create_task(mine.run())
    await until(lambda: mine.running_lines >= 3 * PAGE_LINES)
    await asyncio.sleep(0.02)
    assert mine.running_lines == 3 * PAGE_LINES
    running.cancel()
    await asyncio.wait([running])
    assert mine.running_lines == 0 and len(batches.settled) == 3


async def test_without_jobs_it_waits_until_one_is_handed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def serve(*_: object) -> tuple[str, bool]:
        return "done", False

    monkeypatch.setattr(runner, "IDLE_SECONDS", 3600.0)
    batches, rounds = Batches(1), 0
    jobs, batches.jobs = batches.jobs, []

    async def active() -> list[BatchJob]:
        nonlocal rounds
        rounds += 1
        return batches.jobs

    monkeypatch.setattr(batches, "active", active)
    mine = BatchRunner(BatchConfig(), batches, serve, "r-0", SystemClock())  # type: ignore[arg-type]
    running = asyncio.create_task(mine.run())
    await asyncio.sleep(0.02)
    assert rounds == 1  # and twenty, if it asked as often as with a job
    batches.jobs = jobs
    mine.submitted()
    await until(lambda: len(batches.written) == JOB.total)
    running.cancel()
    await asyncio.wait([running])


async def test_a_line_that_breaks_has_an_error_and_the_rest_of_its_page_a_result() -> None:
    class Reception:
        async def receive(self, *_: object) -> None:
            raise KeyError("a bug")

    class Tenants:
        def named(self, name: str) -> Tenant:
            return Tenant(name)

    body = {"model": "m", "prompt": "hi"}
    line = {"custom_id": "x", "method": "POST", "url": JOB.endpoint, "body": body}
    serve = LineServer(Reception(), Tenants(), SystemClock())  # type: ignore[arg-type]
    result, failed = await serve(JOB, 3, json.dumps(line))
    assert failed and json.loads(result)["response"]["status_code"] == 500
    assert json.loads(result)["custom_id"] == "x" and "a bug" not in result
