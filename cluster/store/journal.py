"""The journal: the latest requests and what became of them. No prompt and no text.

One JSON entry per request under a TTL, and a sorted set of the ids by age that caps their number.
"""

from __future__ import annotations

from typing import Any

from redis.asyncio import Redis

from cluster.store.client import store_errors
from cluster.store.records import JournalEntry

TTL_SECONDS = 24 * 3600
MAX_ENTRIES = 100_000

# KEYS: index. ARGV: entry key prefix, id, entry, received_at, ttl s, cap, oldest score kept.
# Entry keys are built from the prefix: they share the index's slot by its hash tag. At most 64 are
# dropped a call, so that no call is long; each adds one, so the cap holds.
_RECORD = """
redis.call('SET', ARGV[1] .. ARGV[2], ARGV[3], 'EX', ARGV[5])
redis.call('ZADD', KEYS[1], ARGV[4], ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[7])
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[6])
if over > 0 then
  local old = redis.call('ZPOPMIN', KEYS[1], math.min(over, 64))
  for i = 1, #old, 2 do redis.call('DEL', ARGV[1] .. old[i]) end
end
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 1
"""


class Journal:
    """The journal of one cluster. Every method raises `Unavailable` while the store is out."""

    def __init__(self, client: Redis, cluster_name: str, max_entries: int = MAX_ENTRIES) -> None:
        self._client: Any = client
        self._prefix = f"pdserve:{{{cluster_name}}}:journal"
        self._max_entries = max_entries
        self._record = client.register_script(_RECORD)

    async def record(self, entry: JournalEntry) -> None:
        """Writes the entry over the one of the same request."""
        with store_errors():
            await self._record(
                keys=[f"{self._prefix}:index"],
                args=[
                    f"{self._prefix}:entry:",
                    entry.request_id,
                    entry.to_json(),
                    repr(entry.received_at),
                    TTL_SECONDS,
                    self._max_entries,
                    repr(entry.received_at - TTL_SECONDS),
                ],
            )

    async def get(self, request_id: str) -> JournalEntry | None:
        """The request's entry, for a day or until `max_entries` newer ones came."""
        with store_errors():
            raw = await self._client.get(f"{self._prefix}:entry:{request_id}")
        return JournalEntry.from_json(raw) if raw else None

    async def latest(self, count: int) -> list[JournalEntry]:
        """The newest entries, newest first."""
        with store_errors():
            ids = await self._client.zrange(f"{self._prefix}:index", 0, count - 1, desc=True)
            if not ids:
                return []
            raws = await self._client.mget([f"{self._prefix}:entry:{i}" for i in ids])
        return [JournalEntry.from_json(raw) for raw in raws if raw is not None]
