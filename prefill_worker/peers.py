"""Where decode workers take handoffs: from the registry, never from a message."""

from __future__ import annotations

import asyncio
import logging

from cluster.errors import HandoffRefused, Unavailable
from cluster.store.records import WorkerRecord
from cluster.store.registry import Registry

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


class Peers:
    """A view of the registry that follows its changes and outlives the store's outages.

    An incarnation never changes its addresses, so what was seen once stays true for as long as a
    ticket names it.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, WorkerRecord] = {}
        self._task = asyncio.create_task(self._follow())

    async def find(self, worker_id: str, incarnation: str) -> WorkerRecord:
        """One life of a decode worker.

        Raises:
            HandoffRefused: the registry knows no such life of the worker.
            Unavailable: it is new here, and the store does not answer.
        """
        record = self._known.get(worker_id)
        if record is None or record.incarnation != incarnation or not record.transfer_addresses:
            record = await self._registry.get_worker(worker_id)
            if record is None or record.incarnation != incarnation:
                raise HandoffRefused(f"decode worker {worker_id} has gone or was restarted")
            self._known[worker_id] = record
        return record

    async def _follow(self) -> None:
        while True:
            try:
                async for members in self._registry.changes():
                    self._known.update({worker.worker_id: worker for worker in members.workers})
            except Unavailable as error:
                log.warning("peers known from before are used: %s", error)
            await asyncio.sleep(RETRY_SECONDS)
