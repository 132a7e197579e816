"""The journal: the latest requests and what became of them. No prompt and no text.

One JSON entry per request under a TTL, and a sorted set of their names, `<tenant>/<request id>`, by
age that caps their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis

from cluster.store.client import store_errors
from cluster.store.records import JournalEntry

TTL_SECONDS = 24 * 3600
MAX_ENTRIES = 100_000

# KEYS: index. ARGV: entry key prefix, ttl s, cap, then name, entry and received_at of each. What is
# older than the ttl goes, and of what is over the cap a bounded part: no call is long.
# Entry keys are built from the prefix: they share the index's slot by its hash tag.
_RECORD = """
local newest = 0
for i = 4, #ARGV, 3 do
  redis.call('SET', ARGV[1] .. ARGV[i], ARGV[i + 1], 'EX', ARGV[2])
  redis.call('ZADD', KEYS[1], ARGV[i + 2], ARGV[i])
  newest = math.max(newest, tonumber(ARGV[i + 2]))
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. string.format('%.6f', newest - ARGV[2]))
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[3])
if over > 0 then
  local old = redis.call('ZPOPMIN', KEYS[1], math.min(over, 64 + #ARGV))
  for i = 1, #old, 2 do redis.call('DEL', ARGV[1] .. old[i]) end
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
"""


class Journal:
    """The journal of one cluster. Every method raises `Unavailable` while the store is out."""

    def __init__(self, client: Redis, cluster_name: str, max_entries: int = MAX_ENTRIES) -> None:
        self._client: Any = client
        self._prefix = f"pdserve:{{{cluster_name}}}:journal"
        self._max_entries = max_entries
        self._record = client.register_script(_RECORD)

    async def record(self, entries: Sequence[JournalEntry]) -> None:
        """Writes each entry over the one of the same request."""
        args: list[str | int] = [f"{self._prefix}:entry:", TTL_SECONDS, self._max_entries]
        for entry in entries:
            name = f"{entry.tenant}/{entry.request_id}"
            args += [name, entry.to_json(), repr(entry.received_at)]
        with store_errors():
            await self._record(keys=[f"{self._prefix}:index"], args=args)

    async def get(self, request_id: str, tenant: str = "default") -> JournalEntry | None:
        """The request's entry, for a day or until `max_entries` newer ones came."""
        with store_errors():
            raw = await self._client.get(f"{self._prefix}:entry:{tenant}/{request_id}")
        return JournalEntry.from_json(raw) if raw else None

    async def latest(self, count: int) -> list[JournalEntry]:
        """The newest entries, newest first."""
        with store_errors():
            ids = await self._client.zrange(f"{self._prefix}:index", 0, count - 1, desc=True)
            if not ids:
                return []
            raws = await self._client.mget([f"{self._prefix}:entry:{i}" for i in ids])
        return [JournalEntry.from_json(raw) for raw in raws if raw is not None]
