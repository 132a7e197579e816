"""Works on batch jobs: leases pages, serves their lines as batch requests, writes results.

Any number of routers work on the same jobs. A line takes its place in the queue of the batch class,
so it runs in the slack and gives way to online work; how many are there at once is bounded.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from cluster.clock import Clock
from cluster.config_clients import BatchConfig
from cluster.errors import PdserveError, Unavailable
from cluster.store.batch_records import BatchJob, Page
from cluster.store.batches import PAGE_LINES, Batches

POLL_SECONDS = 0.5
IDLE_SECONDS = 5.0
"""How soon jobs are seen that were handed in at another router, while there is none."""

LEASE_SECONDS = 15.0
STORE_RETRY_SECONDS = 1.0
SWEEP_SECONDS = 60.0

Serve = Callable[[BatchJob, int, str], Awaitable[tuple[str, bool]]]
"""Serves a line of a job; returns its result and whether it failed. Never raises."""

log = logging.getLogger(__name__)


@dataclass
class _Work:
    """A page that this router has a lease on."""

    job: BatchJob
    page: Page
    task: asyncio.Task[None] = field(init=False)


class BatchRunner:
    """This router's part in all batch jobs.

    Args:
        owner: this life of this router.
    """

    def __init__(
        self, config: BatchConfig, batches: Batches, serve: Serve, owner: str, clock: Clock
    ) -> None:
        self._config = config
        self._batches = batches
        self._serve = serve
        self._owner = owner
        self._clock = clock
        self._work: dict[tuple[str, int], _Work] = {}
        self._swept_at = -SWEEP_SECONDS
        self._submitted = asyncio.Event()

    @property
    def running_lines(self) -> int:
        return sum(len(work.page.lines) for work in self._work.values())

    def submitted(self) -> None:
        """There is a new job."""
        self._submitted.set()

    async def run(self) -> None:
        """Until cancelled; then its pages are given back."""
        try:
            while True:
                pause = POLL_SECONDS
                self._submitted.clear()
                try:
                    if not await self._round():
                        pause = IDLE_SECONDS
                except Unavailable as error:
                    log.info("batch jobs wait for the store: %s", error)
                except Exception:
                    log.exception("batch jobs: a round failed")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._submitted.wait(), pause)
        finally:
            await self._give_back()

    async def _round(self) -> bool:
        """False if there is no job."""
        now = self._clock.wall()
        jobs = {job.name: job for job in await self._batches.active()}
        await self._renew(jobs, now)
        for job in jobs.values():
            if job.state == "in_progress" and now >= job.deadline_at:
                await self._batches.cancel(job, "expired")
            if job.state != "in_progress" or now >= job.deadline_at:
                await self._end(job)
        open_jobs = [job for job in jobs.values() if job.state == "in_progress"]
        turns = deque(open_jobs)  # a page of each, oldest first, as long as there is room
        while turns and self.running_lines + PAGE_LINES <= self._config.max_running_lines:
            job = turns.popleft()
            page = await self._batches.claim(job, self._owner, now, now + LEASE_SECONDS)
            if page is not None:
                self._begin(job, page)
                turns.append(job)
        if self._clock.now() - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = self._clock.now()
            for job in await self._batches.ended_before(now - self._config.keep_seconds):
                await self._batches.drop(job)
        return bool(jobs)

    async def _renew(self, jobs: dict[str, BatchJob], now: float) -> None:
        """Extends leases; work on pages that are another router's now, or nobody's, is dropped."""
        for name in {name for name, _ in self._work}:
            mine = {page: work for (n, page), work in self._work.items() if n == name}
            kept: set[int] = set()
            if job := jobs.get(name):
                kept = await self._batches.renew(job, self._owner, now + LEASE_SECONDS, mine)
            for page, work in mine.items():
                if page not in kept:
                    work.task.cancel()

    async def _end(self, job: BatchJob) -> None:
        """A job that was cancelled or ran out of time: its lines stop."""
        mine = [work.task for work in self._work.values() if work.job.name == job.name]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        await self._batches.settle(job, self._owner, -1, self._clock.wall())

    def _begin(self, job: BatchJob, page: Page) -> None:
        work = _Work(job, page)
        key = (job.name, page.number)
        self._work[key] = work
        work.task = asyncio.create_task(self._page(work), name=f"batch {job.name} {page.number}")

        def ended(_: asyncio.Task[None]) -> None:
            if self._work.get(key) is work:  # and not what was begun anew since it was given up
                del self._work[key]

        work.task.add_done_callback(ended)

    async def _page(self, work: _Work) -> None:
        job, page = work.job, work.page
        done = False
        try:
            raws = await self._batches.lines(job, page.number)
            first = page.number * PAGE_LINES
            async with asyncio.TaskGroup() as lines:
                for number in page.lines:
                    lines.create_task(self._line(job, number, raws[number - first]))
            done = True
        except Unavailable as error:
            log.info("batch %s: page %d waits: %s", job.name, page.number, error)
        except Exception:
            log.exception("batch %s: page %d broke", job.name, page.number)
        finally:
            try:
                await asyncio.shield(self._settle(job, page, done))
            except PdserveError:
                log.info("batch %s: page %d is left to its lease", job.name, page.number)

    async def _settle(self, job: BatchJob, page: Page, done: bool) -> None:
        await self._batches.settle(job, self._owner, page.number, self._clock.wall(), done)

    async def _line(self, job: BatchJob, number: int, raw: str) -> None:
        result, failed = await self._serve(job, number, raw)
        while True:
            try:
                await self._batches.write_result(job, number, result, failed)
                return
            except Unavailable:
                await asyncio.sleep(STORE_RETRY_SECONDS)

    async def _give_back(self) -> None:
        tasks = [work.task for work in self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
