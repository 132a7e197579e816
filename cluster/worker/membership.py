"""A worker's entry in the registry, kept alive for as long as the worker is."""

from __future__ import annotations

import asyncio
import logging

from cluster.errors import Unavailable
from cluster.store.records import WorkerRecord
from cluster.store.registry import Registry

log = logging.getLogger(__name__)


class Membership:
    """Announces a worker and renews its lease, also through outages of the store.

    Args:
        lease_seconds: renewed every third of it.
    """

    def __init__(self, registry: Registry, lease_seconds: float) -> None:
        self._registry = registry
        self._lease = lease_seconds
        self._record: WorkerRecord | None = None
        self._task: asyncio.Task[None] | None = None
        self.superseded = asyncio.Event()
        """Set when a newer life holds the worker's slot: this one must end."""

    async def announce(self, record: WorkerRecord) -> None:
        """Writes the record now. Raises Unavailable if the store is out."""
        self._record = record
        await self._put(record)
        if self._task is None:
            self._task = asyncio.create_task(self._renew())

    async def withdraw(self) -> None:
        """Takes the record back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._record is not None:
            try:
                await self._registry.remove_worker(self._record.worker_id, self._record.incarnation)
            except Unavailable as error:
                log.warning("not taken out of the registry: %s", error)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)
            if self._record is None:
                continue
            try:
                await self._put(self._record)
            except Unavailable as error:
                log.warning("lease not renewed: %s", error)

    async def _put(self, record: WorkerRecord) -> None:
        if not await self._registry.put_worker(record, self._lease):
            self.superseded.set()
