"""Files that tenants upload for batch jobs: lines of text, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redis.asyncio import Redis

from cluster.store.client import store_errors

_PUSH_LINES = 2000


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

    def __init__(self, client: Redis, cluster_name: str) -> None:
        self._client: Any = client
        self._cluster = f"pdserve:{{{cluster_name}}}"

    async def add(self, tenant: str, record: FileRecord, lines: Sequence[str]) -> None:
        """Writes a file; it is there once all of it is."""
        with store_errors():
            for start in range(0, len(lines), _PUSH_LINES):
                await self._client.rpush(
                    self._lines(tenant, record.file_id), *lines[start : start + _PUSH_LINES]
                )
            await self._client.hset(self._file(tenant, record.file_id), mapping=asdict(record))
            await self._client.zadd(self._index(tenant), {record.file_id: record.created_at})

    async def get(self, tenant: str, file_id: str) -> FileRecord | None:
        """None if the tenant has no such file."""
        with store_errors():
            raw = await self._client.hgetall(self._file(tenant, file_id))
        if not raw:
            return None
        size, created_at = int(raw["bytes"]), float(raw["created_at"])
        return FileRecord(**{**raw, "bytes": size, "created_at": created_at})

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
            gone = await self._client.delete(self._file(tenant, file_id))
            await self._client.delete(self._lines(tenant, file_id))
            await self._client.zrem(self._index(tenant), file_id)
        return record if gone else None

    def _file(self, tenant: str, file_id: str) -> str:
        return f"{self._cluster}:file:{tenant}/{file_id}"

    def _lines(self, tenant: str, file_id: str) -> str:
        return f"{self._cluster}:file-lines:{tenant}/{file_id}"

    def _index(self, tenant: str) -> str:
        return f"{self._cluster}:files:{tenant}"
