"""Where decode workers take handoffs: from the registry, never from a message."""

from __future__ import annotations

from cluster.errors import HandoffRefused
from cluster.store.records import WorkerRecord
from cluster.store.registry import Registry


class Peers:
    """Transfer addresses by worker and incarnation; a miss asks the registry.

    An incarnation never changes its addresses, so an entry stays true for as long as it is asked
    for, also through an outage of the store.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: dict[str, WorkerRecord] = {}

    async def transfer_addresses(self, worker_id: str, incarnation: str) -> tuple[str, ...]:
        """Raises HandoffRefused if the registry knows no such life of the worker."""
        record = self._known.get(worker_id)
        if record is None or record.incarnation != incarnation:
            record = await self._registry.get_worker(worker_id)
            if record is None or record.incarnation != incarnation:
                raise HandoffRefused(f"decode worker {worker_id} has gone or was restarted")
            self._known[worker_id] = record
        return record.transfer_addresses
