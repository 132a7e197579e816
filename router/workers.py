"""The worker pool as this router knows it: follows the registry, keeps a link to each worker."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.clock import Clock
from cluster.errors import PdserveError
from cluster.obs.metrics import RouterMetrics
from cluster.store.records import RouterRecord, WorkerRecord
from cluster.ticket import TicketSigner
from router.link import WorkerLink
from router.placement import Target, WorkerView, missing

POLL_SECONDS = 0.5
STORE_TIMEOUT_SECONDS = 2.0

log = logging.getLogger(__name__)


class Registry(Protocol):
    """The store's registry; every call raises Unavailable when the store is out."""

    async def workers(self) -> list[WorkerRecord]: ...
    async def routers(self) -> list[RouterRecord]: ...
    async def put_router(self, record: RouterRecord, lease_seconds: float) -> None: ...
    async def remove_router(self, router_id: str, incarnation: str) -> None: ...
    def changes(self) -> AsyncIterator[None]: ...


@dataclass
class _Entry:
    """A worker's link, the task that runs it, and when the registry last listed it."""

    link: WorkerLink
    task: asyncio.Task[None]
    listed_at: float


class Workers:
    """The links by worker id; at most one life of each.

    A worker that the registry no longer lists is still used for one lease while its stream is up: a
    store that comes back empty must not stop the data path.
    """

    def __init__(
        self,
        registry: Registry,
        router_id: str,
        signer: TicketSigner,
        metrics: RouterMetrics,
        clock: Clock,
        lease_seconds: float,
    ) -> None:
        self._registry = registry
        self._router_id = router_id
        self._signer = signer
        self._metrics = metrics
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._entries: dict[str, _Entry] = {}
        self._records: list[WorkerRecord] = []
        self._listeners: list[Callable[[], None]] = []
        self.store_reachable = False

    @property
    def records(self) -> list[WorkerRecord]:
        """The registry as it was last read."""
        return self._records

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after a change of what can be placed on."""
        self._listeners.append(listener)

    def view(self) -> list[WorkerView]:
        """What placement sees: the workers with a link."""
        return [_view(entry.link) for entry in self._entries.values()]

    def link(self, target: Target) -> WorkerLink | None:
        """The link to that life of that worker, if there is one."""
        entry = self._entries.get(target.worker_id)
        if entry is None or entry.link.record.incarnation != target.incarnation:
            return None
        return entry.link

    def links(self) -> list[WorkerLink]:
        return [entry.link for entry in self._entries.values()]

    def missing(self, model: str) -> str:
        """What keeps `model` from being served, in words; empty if nothing does."""
        return missing(model, self.view())

    async def run(self) -> None:
        """Follows the registry until cancelled; the links end with it."""
        async with asyncio.TaskGroup() as tasks:
            changes: AsyncIterator[None] | None = None
            change: asyncio.Task[bool] | None = None
            try:
                while True:
                    await self._refresh(tasks)
                    if change is None:
                        changes = changes or self._registry.changes()
                        change = tasks.create_task(_next(changes))
                    await asyncio.wait({change}, timeout=POLL_SECONDS)
                    if change.done():
                        if not change.result():
                            changes = None
                            await asyncio.sleep(POLL_SECONDS)
                        change = None
            finally:
                for entry in self._entries.values():
                    entry.task.cancel()
                if change is not None:
                    change.cancel()

    async def _refresh(self, tasks: asyncio.TaskGroup) -> None:
        try:
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                records = await self._registry.workers()
        except (PdserveError, TimeoutError) as error:
            if self.store_reachable:
                log.warning("store is out, serving from the last view: %s", error)
            self._reached(False)
            return
        if not self.store_reachable:
            log.info("store is reachable")
        self._reached(True)
        changed = records != self._records
        self._records = records
        for record in records:
            changed |= self._follow(record, tasks)
        changed |= self._drop_unlisted({r.worker_id for r in records})
        if changed:
            self._changed()

    def _follow(self, record: WorkerRecord, tasks: asyncio.TaskGroup) -> bool:
        now = self._clock.now()
        entry = self._entries.get(record.worker_id)
        if entry is not None:
            old = entry.link.record
            if (old.incarnation, old.address) == (record.incarnation, record.address):
                entry.link.record = record
                entry.listed_at = now
                return False
            self._close(entry)
        if not record.address or record.state not in ("ready", "draining"):
            return entry is not None
        link = WorkerLink(record, self._router_id, self._signer, self._changed)
        task = tasks.create_task(link.run(), name=f"link {record.worker_id}")
        self._entries[record.worker_id] = _Entry(link, task, now)
        return True

    def _drop_unlisted(self, listed: set[str]) -> bool:
        now = self._clock.now()
        gone = [
            entry
            for worker_id, entry in self._entries.items()
            if worker_id not in listed
            and (not entry.link.connected or now - entry.listed_at > self._lease_seconds)
        ]
        for entry in gone:
            self._close(entry)
        return bool(gone)

    def _close(self, entry: _Entry) -> None:
        """The link's task fails what it carries when it ends."""
        self._entries.pop(entry.link.record.worker_id, None)
        entry.task.cancel()

    def _reached(self, reachable: bool) -> None:
        self.store_reachable = reachable
        self._metrics.store_reachable.set(reachable)

    def _changed(self) -> None:
        self._metrics.count_workers(Counter((r.model, r.role, r.state) for r in self._records))
        for listener in self._listeners:
            listener()


async def _next(changes: AsyncIterator[None]) -> bool:
    """Waits for a change; False if none will come from this iterator."""
    try:
        await anext(changes)
    except (StopAsyncIteration, PdserveError):
        return False
    return True


def _view(link: WorkerLink) -> WorkerView:
    record = link.record
    return WorkerView(
        Target(record.worker_id, record.incarnation),
        record.model,
        record.role,
        record.state == "ready",
        link.connected,
        record.layout,
        link.load,
    )
