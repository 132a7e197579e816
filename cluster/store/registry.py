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

POLL_SECONDS = 0.5
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

# Drops the ids whose record is gone, checked again so that a put in between is not undone.
# KEYS: index, then records. ARGV: ids.
_DROP_EXPIRED = """
for i, id in ipairs(ARGV) do
  if redis.call('EXISTS', KEYS[i + 1]) == 0 then redis.call('SREM', KEYS[1], id) end
end
return 1
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
        self._drop = client.register_script(_DROP_EXPIRED)

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
        return [WorkerRecord.from_json(raw) for raw in await self._living("worker")]

    async def remove_worker(self, worker_id: str, incarnation: str) -> bool:
        """Removes the worker if it is still that life; True if it was."""
        return await self._delete("worker", worker_id, incarnation)

    async def put_router(self, record: RouterRecord, lease_seconds: float) -> bool:
        """As `put_worker`."""
        return await self._write("router", record.router_id, record, lease_seconds)

    async def routers(self) -> list[RouterRecord]:
        """All living routers, sorted by id."""
        return [RouterRecord.from_json(raw) for raw in await self._living("router")]

    async def remove_router(self, router_id: str, incarnation: str) -> bool:
        """As `remove_worker`."""
        return await self._delete("router", router_id, incarnation)

    async def members(self) -> Members:
        """All living workers and routers."""
        return Members(tuple(await self.workers()), tuple(await self.routers()))

    async def changes(self) -> AsyncIterator[Members]:
        """The members now, and again after every change: at once when published, and within
        `POLL_SECONDS` when a lease ran out or a message was lost.

        Raises `Unavailable` when the store fails; iterate anew to go on.
        """
        last: Members | None = None
        pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        try:
            with store_errors():
                await pubsub.subscribe(self._channel)
            while True:
                members = await self.members()
                if members != last:
                    last = members
                    yield members
                with store_errors():
                    await pubsub.get_message(timeout=POLL_SECONDS)
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

    async def _living(self, kind: str) -> Sequence[str]:
        with store_errors():
            ids = sorted(await self._client.smembers(self._index(kind)))
            if not ids:
                return ()
            keys = [self._key(kind, member_id) for member_id in ids]
            raws = await self._client.mget(keys)
            gone = [(key, i) for key, i, raw in zip(keys, ids, raws, strict=True) if raw is None]
            if gone:
                await self._drop(
                    keys=[self._index(kind), *(key for key, _ in gone)], args=[i for _, i in gone]
                )
        return [raw for raw in raws if raw is not None]

    def _key(self, kind: str, member_id: str) -> str:
        return f"{self._prefix}:{kind}:{member_id}"

    def _index(self, kind: str) -> str:
        return f"{self._prefix}:{kind}s"


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
