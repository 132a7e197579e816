"""Batch jobs: their lines, who works on which, and results, each written once.

Everything of a job lies under `pdserve:{cluster}:batch…:<tenant>/<id>`: the job (a hash), its lines
(a list of the input's own, so that the file may go), its pages (line numbers / PAGE_LINES; a sorted
set by the end of the lease that a router has on them), the lines that are done (a bitmap) and two
lists of results. A page is leased, a result is written by whoever finishes first and by nobody
after: a line whose router died is done again by another one, and still has one result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from redis.asyncio import Redis

from cluster.store.batch_records import BatchJob, BatchState, Page
from cluster.store.client import store_errors
from cluster.store.lines import UNOWNED_SECONDS, Lines

PAGE_LINES = 16
RECORD_BYTES = 1024
"""What a job counts for besides its lines and results."""

# KEYS: job, index, stored bytes, active, pages, lines, errors, done. ARGV: id, name, created at,
# pages, bytes, the most bytes, then the job's fields. 0: there is no room.
_ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
if (tonumber(redis.call('GET', KEYS[3])) or 0) + ARGV[5] > tonumber(ARGV[6]) then
  redis.call('DEL', KEYS[6], KEYS[7], KEYS[8])
  return 0
end
redis.call('HSET', KEYS[1], unpack(ARGV, 7))
redis.call('INCRBY', KEYS[3], ARGV[5])
for page = 0, ARGV[4] - 1 do redis.call('ZADD', KEYS[5], 0, page) end
for i = 6, 8 do redis.call('PERSIST', KEYS[i]) end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[2])
return 1
"""

# KEYS: pages, owners, done, job. ARGV: owner, now, lease end, page lines, total. The next free page
# and its open lines; nothing if there is none.
_CLAIM = """
if redis.call('HGET', KEYS[4], 'state') ~= 'in_progress' then return {} end
local page = redis.call('ZRANGE', KEYS[1], '-inf', ARGV[2], 'BYSCORE', 'LIMIT', 0, 1)[1]
if not page then return {} end
redis.call('ZADD', KEYS[1], ARGV[3], page)
redis.call('HSET', KEYS[2], page, ARGV[1])
local open = {page}
local first = page * ARGV[4]
for line = first, math.min(first + ARGV[4], ARGV[5]) - 1 do
  if redis.call('GETBIT', KEYS[3], line) == 0 then open[#open + 1] = line end
end
return open
"""

# KEYS: pages, owners. ARGV: owner, lease end, pages. Those that are the owner's still.
_RENEW = """
local mine = {}
for i = 3, #ARGV do
  if redis.call('HGET', KEYS[2], ARGV[i]) == ARGV[1] then
    redis.call('ZADD', KEYS[1], 'XX', ARGV[2], ARGV[i])
    mine[#mine + 1] = ARGV[i]
  end
end
return mine
"""

# KEYS: done, results of the kind, job, stored bytes. ARGV: line, result, counter.
_RESULT = """
local state = redis.call('HGET', KEYS[3], 'state')
if state ~= 'in_progress' and state ~= 'cancelling' then return 0 end
if redis.call('SETBIT', KEYS[1], ARGV[1], 1) == 1 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[2])
redis.call('HINCRBY', KEYS[3], ARGV[3], 1)
redis.call('HINCRBY', KEYS[3], 'bytes', #ARGV[2])
redis.call('INCRBY', KEYS[4], #ARGV[2])
return 1
"""

# KEYS: pages, owners, job, lines, done, active, ended. ARGV: owner, page (or -1), now, name, done.
# A page is done, or given back; the job ends with its last page, or, cancelled, with the last that
# is leased.
_SETTLE = """
if tonumber(ARGV[2]) >= 0 and redis.call('HGET', KEYS[2], ARGV[2]) == ARGV[1] then
  redis.call('HDEL', KEYS[2], ARGV[2])
  if ARGV[5] == '1' then redis.call('ZREM', KEYS[1], ARGV[2])
  else redis.call('ZADD', KEYS[1], 'XX', 0, ARGV[2]) end
end
local state, final = unpack(redis.call('HMGET', KEYS[3], 'state', 'final'))
if state == 'cancelling' then redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[3]) end
if (state == 'in_progress' or state == 'cancelling') and redis.call('ZCARD', KEYS[1]) == 0 then
  local ended = state == 'cancelling' and final or 'completed'
  redis.call('HSET', KEYS[3], 'state', ended, 'ended_at', ARGV[3])
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[4], KEYS[5])
  redis.call('ZREM', KEYS[6], ARGV[4])
  redis.call('ZADD', KEYS[7], ARGV[3], ARGV[4])
  return 1
end
return 0
"""

# KEYS: index, ended, stored bytes, job, then the rest of it. ARGV: id, name. Counted out once,
# however often it is called.
_DROP = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[2])
local size = redis.call('HGET', KEYS[4], 'bytes')
if not size then return 0 end
redis.call('DECRBY', KEYS[3], size)
redis.call('DEL', unpack(KEYS, 4))
return 1
"""

# KEYS: job. ARGV: final state.
_CANCEL = """
if redis.call('HGET', KEYS[1], 'state') ~= 'in_progress' then return 0 end
redis.call('HSET', KEYS[1], 'state', 'cancelling', 'final', ARGV[1])
return 1
"""


class Batches:
    """The batch jobs of one cluster. Every method raises `Unavailable` while the store is out.

    Args:
        max_stored_bytes: that lines and results of all jobs take together, and files.
    """

    def __init__(self, client: Redis, cluster_name: str, max_stored_bytes: int) -> None:
        self._client: Any = client
        self._cluster = f"pdserve:{{{cluster_name}}}"
        self._written = Lines(client, cluster_name, max_stored_bytes)
        self._add = client.register_script(_ADD)
        self._drop = client.register_script(_DROP)
        self._claim = client.register_script(_CLAIM)
        self._renew = client.register_script(_RENEW)
        self._result = client.register_script(_RESULT)
        self._settle = client.register_script(_SETTLE)
        self._cancel = client.register_script(_CANCEL)

    async def add(
        self, job: BatchJob, lines: Sequence[str], errors: Iterable[tuple[int, str]]
    ) -> BatchJob:
        """Writes a job; it is worked on once all of it is there.

        Args:
            errors: results of lines that cannot be served.

        Raises:
            Overloaded: the store holds all that it may.
        """
        failed = sorted(dict(errors).items())
        results = [result for _, result in failed]
        size = RECORD_BYTES + len(job.to_hash()["metadata"])
        size += sum(len(line.encode()) for line in (*lines, *results))
        job = replace(job, bytes=size, failed=len(failed))
        await self._written.check_room(size)
        await self._written.write(self._key("lines", job), lines)
        await self._written.write(self._key("errors", job), results)
        with store_errors():
            if failed:
                done = _bitmap((line for line, _ in failed), len(lines))
                await self._client.set(self._key("done", job), done, ex=UNOWNED_SECONDS)
            keys = [self._key("job", job), self._index(job.tenant), self._stored, self._active]
            keys += [self._key(kind, job) for kind in ("pages", "lines", "errors", "done")]
            pages = -(-len(lines) // PAGE_LINES)
            args: list[Any] = [job.batch_id, job.name, job.created_at, pages, size]
            args.append(self._written.max_bytes)
            args += [part for field in job.to_hash().items() for part in field]
            if not await self._add(keys=keys, args=args):
                raise self._written.full()
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
        args: list[Any] = [owner, page, now, job.name, int(done)]
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

    def _key(self, kind: str, job: BatchJob) -> str:
        return f"{self._cluster}:batch-{kind}:{job.name}"


def _bitmap(bits: Iterable[int], size: int) -> bytes:
    """As SETBIT numbers them: from the first byte's highest bit on."""
    made = bytearray(-(-size // 8))
    for bit in bits:
        made[bit // 8] |= 0x80 >> bit % 8
    return bytes(made)
