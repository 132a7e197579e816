"""Files that tenants upload for batch jobs: lines of text, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from cluster.store.client import store_errors
from cluster.store.lines import Lines
from cluster.store.records import known_fields

# KEYS: file, lines, index, stored bytes. ARGV: id, created at, bytes, the most bytes, then the
# file's fields. 0: there is no room.
_ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
if (tonumber(redis.call('GET', KEYS[4])) or 0) + ARGV[3] > tonumber(ARGV[4]) then
  redis.call('DEL', KEYS[2])
  return 0
end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('PERSIST', KEYS[2])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
redis.call('INCRBY', KEYS[4], ARGV[3])
return 1
"""

# KEYS: file, lines, index, stored bytes. ARGV: id.
_DELETE = """
local size = redis.call('HGET', KEYS[1], 'bytes')
redis.call('ZREM', KEYS[3], ARGV[1])
if not size then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('DECRBY', KEYS[4], size)
return 1
"""


@dataclass(frozen=True)
class FileRecord:
    """An uploaded file; `bytes` as it came, `created_at` in seconds since 1970."""

    file_id: str
    filename: str
    purpose: str
    bytes: int
    created_at: float


class Files:
    """The files of one cluster, by tenant. Every method raises `Unavailable` while it is out."""

    def __init__(self, client: Redis, cluster_name: str, max_stored_bytes: int) -> None:
        self._client: Any = client
        self._cluster = f"pdserve:{{{cluster_name}}}"
        self._written = Lines(client, cluster_name, max_stored_bytes)
        self._add = client.register_script(_ADD)
        self._delete = client.register_script(_DELETE)

    async def add(self, tenant: str, record: FileRecord, lines: Sequence[str]) -> None:
        """Writes a file; it is there once all of it is. Raises Overloaded: there is no room."""
        await self._written.check_room(record.bytes)
        await self._written.write(self._lines(tenant, record.file_id), lines)
        args: list[Any] = [record.file_id, record.created_at, record.bytes, self._written.max_bytes]
        args += [part for field in asdict(record).items() for part in field]
        with store_errors():
            done = await self._add(keys=self._keys(tenant, record.file_id), args=args)
        if not done:
            raise self._written.full()

    async def get(self, tenant: str, file_id: str) -> FileRecord | None:
        """None if the tenant has no such file."""
        with store_errors():
            raw = await self._client.hgetall(self._file(tenant, file_id))
        if not raw:
            return None
        size, created_at = int(raw["bytes"]), float(raw["created_at"])
        return FileRecord(
            **{**known_fields(FileRecord, raw), "bytes": size, "created_at": created_at}
        )

    async def latest(self, tenant: str, limit: int) -> list[FileRecord]:
        """The tenant's files, newest first."""
        with store_errors():
            ids = await self._client.zrange(self._index(tenant), 0, limit - 1, desc=True)
        records = [await self.get(tenant, file_id) for file_id in ids]
        return [record for record in records if record is not None]

    async def lines(self, tenant: str, file_id: str, start: int = 0, count: int = 0) -> list[str]:
        """So many lines from `start` on; 0: all."""
        with store_errors():
            last = start + count - 1 if count else -1
            return list(await self._client.lrange(self._lines(tenant, file_id), start, last))

    async def delete(self, tenant: str, file_id: str) -> FileRecord | None:
        """What was deleted. Jobs have their own copy of the lines."""
        record = await self.get(tenant, file_id)
        if record is None:
            return None
        with store_errors():
            gone = await self._delete(keys=self._keys(tenant, file_id), args=[file_id])
        return record if gone else None

    def _keys(self, tenant: str, file_id: str) -> list[str]:
        file, lines = self._file(tenant, file_id), self._lines(tenant, file_id)
        return [file, lines, self._index(tenant), self._written.counter]

    def _file(self, tenant: str, file_id: str) -> str:
        return f"{self._cluster}:file:{tenant}/{file_id}"

    def _lines(self, tenant: str, file_id: str) -> str:
        return f"{self._cluster}:file-lines:{tenant}/{file_id}"

    def _index(self, tenant: str) -> str:
        return f"{self._cluster}:files:{tenant}"
