"""The registry: which workers and routers live, each under a lease.

A member is one JSON record under `pdserve:{cluster}:worker:<id>` that expires with its lease, plus
its id in an index set, so that nothing ever scans the key space. The braces are a hash tag: all
keys of a cluster share a slot. A `fence` beside each record remembers the newest life seen for
`FENCE_LEASES` leases, so that a frozen process that wakes up cannot put its former self back, and
the newest epoch of that life, so that a late write cannot put its former role back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from cluster.errors import Unavailable
from cluster.store.client import store_errors
from cluster.store.records import RouterRecord, WorkerRecord

POLL_SECONDS = 2.0
"""How soon a change is seen whose message was lost."""

FENCE_LEASES = 5

# A life is (started_at, incarnation), compared in that order. KEYS: record, fence, index.
# ARGV: id, incarnation, started_at, record, lease ms, fence ms, channel, epoch. 0: superseded by a
# newer life; 2: the life itself has gone on to a newer epoch, and nothing was written.
_PUT = """
local fence = redis.call('GET', KEYS[2])
if fence then
  local at, life, epoch = string.match(fence, '^(%S+) (%S+) ?(%d*)$')
  at = tonumber(at)
  local mine = tonumber(ARGV[3])
  if at > mine or (at == mine and life > ARGV[2]) then return 0 end
  if life == ARGV[2] and (tonumber(epoch) or 0) > tonumber(ARGV[8]) then return 2 end
end
redis.call('SET', KEYS[2], ARGV[3] .. ' ' .. ARGV[2] .. ' ' .. ARGV[8], 'PX', ARGV[6])
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
redis.call('SADD', KEYS[3], ARGV[1])
if before ~= ARGV[4] then redis.call('PUBLISH', ARGV[7], ARGV[1]) end
return 1
"""

# KEYS: record, fence. ARGV: incarnation, lease ms, fence ms.
_RENEW = """
local held = redis.call('GET', KEYS[1])
if not held or cjson.decode(held).incarnation ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""

# KEYS: record, index. ARGV: id, incarnation, channel.
_REMOVE = """
local held = redis.call('GET', KEYS[1])
if not held or cjson.decode(held).incarnation ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
redis.call('PUBLISH', ARGV[3], ARGV[1])
return 1
"""

# The records of each index, and in how many ms the first lease ends (-1: there is none); drops ids
# whose lease has ended. KEYS: indices. ARGV: what stands before an id in the name of its record.
_READ = """
local found, soonest = {}, -1
for i, index in ipairs(KEYS) do
  found[i] = {}
  for _, id in ipairs(redis.call('SMEMBERS', index)) do
    local key = ARGV[i] .. id
    local held = redis.call('GET', key)
    if held then
      table.insert(found[i], held)
      local left = redis.call('PTTL', key)
      if left >= 0 and (soonest < 0 or left < soonest) then soonest = left end
    else
      redis.call('SREM', index, id)
    end
  end
end
return {soonest, unpack(found)}
"""


@dataclass(frozen=True)
class Members:
    """Everyone whose lease runs, sorted by id."""

    workers: tuple[WorkerRecord, ...]
    routers: tuple[RouterRecord, ...]


class Registry:
    """The registry of one cluster. Every method raises `Unavailable` while the store is out."""

    def __init__(self, client: Redis, cluster_name: str) -> None:
        self._client: Any = client  # the library's own hints mix sync and async replies
        self._prefix = f"pdserve:{{{cluster_name}}}"
        self._channel = f"{self._prefix}:changes"
        self._put = client.register_script(_PUT)
        self._renew = client.register_script(_RENEW)
        self._remove = client.register_script(_REMOVE)
        self._read = client.register_script(_READ)

    async def put_worker(self, record: WorkerRecord, lease_seconds: float) -> bool:
        """Writes the record and starts its lease anew.

        False if a newer life holds the slot: nothing was written, and this life is over. A record
        of an epoch that the life has left behind is not written either.
        """
        return await self._write("worker", record.worker_id, record, lease_seconds)

    async def renew_worker(self, worker_id: str, incarnation: str, lease_seconds: float) -> bool:
        """Extends the lease; False if it has run out or is another life's: put the record again."""
        key = self._key("worker", worker_id)
        with store_errors():
            done = await self._renew(
                keys=[key, f"{key}:fence"],
                args=[incarnation, _ms(lease_seconds), _ms(lease_seconds * FENCE_LEASES)],
            )
        return bool(done)

    async def get_worker(self, worker_id: str) -> WorkerRecord | None:
        """The worker's living record."""
        with store_errors():
            raw = await self._client.get(self._key("worker", worker_id))
        return WorkerRecord.from_json(raw) if raw else None

    async def workers(self) -> list[WorkerRecord]:
        """All living workers, sorted by id."""
        _, raws = await self._living("worker")
        return list(_workers(raws))

    async def remove_worker(self, worker_id: str, incarnation: str) -> bool:
        """Removes the worker if it is still that life; True if it was."""
        return await self._delete("worker", worker_id, incarnation)

    async def put_router(self, record: RouterRecord, lease_seconds: float) -> bool:
        """As `put_worker`."""
        return await self._write("router", record.router_id, record, lease_seconds)

    async def routers(self) -> list[RouterRecord]:
        """All living routers, sorted by id."""
        _, raws = await self._living("router")
        return list(_routers(raws))

    async def remove_router(self, router_id: str, incarnation: str) -> bool:
        """As `remove_worker`."""
        return await self._delete("router", router_id, incarnation)

    async def members(self) -> Members:
        """All living workers and routers."""
        _, workers, routers = await self._living("worker", "router")
        return Members(_workers(workers), _routers(routers))

    async def changes(self) -> AsyncIterator[Members]:
        """The members now, and again after every change: at once when published or when a lease
        runs out, within `POLL_SECONDS` when a message was lost.

        Raises `Unavailable` when the store fails; iterate anew to go on.
        """
        last: list[set[str]] = []
        pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        try:
            with store_errors():
                await pubsub.subscribe(self._channel)
            while True:
                soonest, *raws = await self._living("worker", "router")
                if (seen := [set(each) for each in raws]) != last:
                    last = seen
                    yield Members(_workers(raws[0]), _routers(raws[1]))
                until = min(POLL_SECONDS, (soonest + 1) / 1e3) if soonest >= 0 else POLL_SECONDS
                with store_errors():
                    await pubsub.get_message(timeout=until)
        finally:
            with suppress(Unavailable), store_errors():
                async with asyncio.timeout(1):
                    await pubsub.aclose()

    async def _write(
        self, kind: str, member_id: str, record: WorkerRecord | RouterRecord, lease_seconds: float
    ) -> bool:
        key = self._key(kind, member_id)
        with store_errors():
            done = await self._put(
                keys=[key, f"{key}:fence", self._index(kind)],
                args=[
                    member_id,
                    record.incarnation,
                    repr(record.started_at),
                    record.to_json(),
                    _ms(lease_seconds),
                    _ms(lease_seconds * FENCE_LEASES),
                    self._channel,
                    record.epoch if isinstance(record, WorkerRecord) else 0,
                ],
            )
        return bool(done)

    async def _delete(self, kind: str, member_id: str, incarnation: str) -> bool:
        with store_errors():
            done = await self._remove(
                keys=[self._key(kind, member_id), self._index(kind)],
                args=[member_id, incarnation, self._channel],
            )
        return bool(done)

    async def _living(self, *kinds: str) -> Any:
        """In how many ms the first lease ends (-1: there is none), then the records by kind."""
        with store_errors():
            return await self._read(
                keys=[self._index(kind) for kind in kinds], args=[self._key(k, "") for k in kinds]
            )

    def _key(self, kind: str, member_id: str) -> str:
        return f"{self._prefix}:{kind}:{member_id}"

    def _index(self, kind: str) -> str:
        return f"{self._prefix}:{kind}s"


def _workers(raws: Sequence[str]) -> tuple[WorkerRecord, ...]:
    return tuple(sorted(map(WorkerRecord.from_json, raws), key=lambda record: record.worker_id))


def _routers(raws: Sequence[str]) -> tuple[RouterRecord, ...]:
    return tuple(sorted(map(RouterRecord.from_json, raws), key=lambda record: record.router_id))


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
