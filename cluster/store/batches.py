"""Batch jobs: their lines, who works on which, and results, each written once.

Everything of a job lies under `pdserve:{cluster}:batch…:<tenant>/<id>`: the job (a hash), its lines
(a list of the input's own, so that the file may go), its pages (line numbers / PAGE_LINES; a sorted
set by the end of the lease that a router has on them), the lines that are done (a bitmap) and two
lists of results. A page is leased, a result is written by whoever finishes first and by nobody
after: a line whose router died is done again by another one, and still has one result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from cluster.errors import Overloaded
from cluster.store import batch_scripts as scripts
from cluster.store.batch_records import BatchJob, BatchState, Page
from cluster.store.client import store_errors
from cluster.store.lines import UNOWNED_SECONDS, Lines

PAGE_LINES = 16
RECORD_BYTES = 1024
"""What a job counts for besides its lines and results."""


class Batches:
    """The batch jobs of one cluster. Every method raises `Unavailable` while the store is out.

    Args:
        max_stored_bytes: that lines and results of all jobs take together, and files.
    """

    def __init__(self, client: Redis, cluster_name: str, max_stored_bytes: int) -> None:
        self._client: Any = client
        self._cluster = f"pdserve:{{{cluster_name}}}"
        self._written = Lines(client, cluster_name, max_stored_bytes)
        self._add = client.register_script(scripts.ADD)
        self._drop = client.register_script(scripts.DROP)
        self._claim = client.register_script(scripts.CLAIM)
        self._renew = client.register_script(scripts.RENEW)
        self._result = client.register_script(scripts.RESULT)
        self._settle = client.register_script(scripts.SETTLE)
        self._cancel = client.register_script(scripts.CANCEL)

    async def add(
        self,
        job: BatchJob,
        lines: Sequence[str],
        errors: Iterable[tuple[int, str]],
        max_unfinished: float = math.inf,
    ) -> BatchJob:
        """Writes a job; it is worked on once all of it is there.

        Args:
            errors: results of lines that cannot be served.
            max_unfinished: jobs of its tenant that have not ended, this one included.

        Raises:
            Overloaded: the store holds all that it may, or the tenant has so many.
        """
        failed = sorted(dict(errors).items())
        results = [result for _, result in failed]
        size = RECORD_BYTES + len(job.to_hash()["metadata"])
        size += sum(len(line.encode()) for line in (*lines, *results))
        job = replace(job, bytes=size, failed=len(failed))
        with store_errors():
            if await self._client.scard(self._unfinished(job.tenant)) >= max_unfinished:
                raise _too_many(job.tenant, max_unfinished)
        await self._written.check_room(size)
        await self._written.write(self._key("lines", job), lines)
        await self._written.write(self._key("errors", job), results)
        with store_errors():
            if failed:
                done = _bitmap((line for line, _ in failed), len(lines))
                await self._client.set(self._key("done", job), done, ex=UNOWNED_SECONDS)
            keys = [self._key("job", job), self._index(job.tenant), self._stored, self._active]
            keys += [self._key(kind, job) for kind in ("pages", "lines", "errors", "done")]
            keys.append(self._unfinished(job.tenant))
            pages = -(-len(lines) // PAGE_LINES)
            args: list[Any] = [job.batch_id, job.name, job.created_at, pages, size]
            args += [self._written.max_bytes, max_unfinished]
            args += [part for field in job.to_hash().items() for part in field]
            added = await self._add(keys=keys, args=args)
        if added == 0:
            raise self._written.full()
        if added < 0:
            raise _too_many(job.tenant, max_unfinished)
        return job

    async def get(self, tenant: str, batch_id: str) -> BatchJob | None:
        """None if the tenant has no such job."""
        with store_errors():
            raw = await self._client.hgetall(f"{self._cluster}:batch-job:{tenant}/{batch_id}")
        return BatchJob.from_hash(raw) if raw else None

    async def latest(self, tenant: str, limit: int, after: str = "") -> list[BatchJob]:
        """The tenant's jobs, newest first, behind `after`."""
        with store_errors():
            rank = await self._client.zrevrank(self._index(tenant), after) if after else None
            start = 0 if rank is None else rank + 1
            ids = await self._client.zrange(
                self._index(tenant), start, start + limit - 1, desc=True
            )
        jobs = [await self.get(tenant, batch_id) for batch_id in ids]
        return [job for job in jobs if job is not None]

    async def active(self) -> list[BatchJob]:
        """All jobs that have not ended, oldest first."""
        with store_errors():
            names = await self._client.zrange(self._active, 0, -1)
        jobs = [await self.get(*name.split("/", 1)) for name in names]
        return [job for job in jobs if job is not None]

    async def claim(self, job: BatchJob, owner: str, now: float, until: float) -> Page | None:
        """Leases the next free page; None if there is none."""
        keys = [self._key(kind, job) for kind in ("pages", "owners", "done", "job")]
        with store_errors():
            found = await self._claim(keys=keys, args=[owner, now, until, PAGE_LINES, job.total])
        return Page(int(found[0]), tuple(map(int, found[1:]))) if found else None

    async def renew(
        self, job: BatchJob, owner: str, until: float, pages: Iterable[int]
    ) -> set[int]:
        """Extends leases; returns the pages that are the owner's still."""
        keys = [self._key(kind, job) for kind in ("pages", "owners")]
        with store_errors():
            return set(map(int, await self._renew(keys=keys, args=[owner, until, *pages])))

    async def lines(self, job: BatchJob, page: int) -> list[str]:
        """The lines of a page."""
        start = page * PAGE_LINES
        with store_errors():
            return list(
                await self._client.lrange(self._key("lines", job), start, start + PAGE_LINES - 1)
            )

    async def write_result(self, job: BatchJob, line: int, result: str, failed: bool) -> bool:
        """False if the line has one already, or the job is gone."""
        kind, counter = ("errors", "failed") if failed else ("output", "completed")
        keys = [self._key("done", job), self._key(kind, job), self._key("job", job), self._stored]
        with store_errors():
            return bool(await self._result(keys=keys, args=[line, result, counter]))

    async def settle(
        self, job: BatchJob, owner: str, page: int, now: float, done: bool = True
    ) -> bool:
        """A page is done, or given back (-1: neither); True if the job has ended with that."""
        kinds = ("pages", "owners", "job", "lines", "done")
        keys = [*(self._key(kind, job) for kind in kinds), self._active, self._ended]
        keys.append(self._unfinished(job.tenant))
        args: list[Any] = [owner, page, now, job.name, int(done), job.batch_id]
        with store_errors():
            return bool(await self._settle(keys=keys, args=args))

    async def cancel(self, job: BatchJob, final: BatchState = "cancelled") -> bool:
        """It takes up no more lines; False if it is not in progress."""
        with store_errors():
            return bool(await self._cancel(keys=[self._key("job", job)], args=[final]))

    async def results(self, job: BatchJob, failed: bool, start: int, count: int) -> list[str]:
        """Results in the order in which they came."""
        key = self._key("errors" if failed else "output", job)
        with store_errors():
            return list(await self._client.lrange(key, start, start + count - 1))

    async def ended_before(self, wall: float) -> list[BatchJob]:
        """Jobs that ended before then; at most 16."""
        with store_errors():
            found = await self._client.zrange(
                self._ended, "-inf", wall, byscore=True, offset=0, num=16
            )
        jobs = [await self.get(*name.split("/", 1)) for name in found]
        return [job for job in jobs if job is not None]

    async def drop(self, job: BatchJob) -> None:
        """Forgets a job that has ended, results and all."""
        keys = [self._index(job.tenant), self._ended, self._stored]
        kinds = ("job", "lines", "pages", "owners", "done", "output", "errors")
        keys += [self._key(kind, job) for kind in kinds]
        with store_errors():
            await self._drop(keys=keys, args=[job.batch_id, job.name])

    @property
    def _active(self) -> str:
        return f"{self._cluster}:batches-active"

    @property
    def _ended(self) -> str:
        return f"{self._cluster}:batches-ended"

    @property
    def _stored(self) -> str:
        return self._written.counter

    def _index(self, tenant: str) -> str:
        return f"{self._cluster}:batches:{tenant}"

    def _unfinished(self, tenant: str) -> str:
        return f"{self._cluster}:batches-unfinished:{tenant}"

    def _key(self, kind: str, job: BatchJob) -> str:
        return f"{self._cluster}:batch-{kind}:{job.name}"


def _too_many(tenant: str, most: float) -> Overloaded:
    return Overloaded(
        f"tenants.{tenant}.limits.batch_jobs: {most:g} batch jobs of the tenant have not ended; "
        "wait for one to end, cancel one, or raise the limit",
        60.0,
    )


def _bitmap(bits: Iterable[int], size: int) -> bytes:
    """As SETBIT numbers them: from the first byte's highest bit on."""
    made = bytearray(-(-size // 8))
    for bit in bits:
        made[bit // 8] |= 0x80 >> bit % 8
    return bytes(made)
