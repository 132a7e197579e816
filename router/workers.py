"""The worker pool as this router knows it: follows the registry, keeps a link to each worker."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.clock import Clock
from cluster.errors import PdserveError
from cluster.obs.metrics import RouterMetrics
from cluster.store.records import RouterRecord, WorkerRecord
from cluster.store.registry import Members
from cluster.ticket import TicketSigner
from router.fleet import Fleet
from router.link import WorkerLink
from router.placement import Mode, Target, WorkerView, missing

TICK_SECONDS = 0.5
STORE_TIMEOUT_SECONDS = 2.0

log = logging.getLogger(__name__)


class Registry(Protocol):
    """The store's registry; every call raises Unavailable while the store is out."""

    async def routers(self) -> list[RouterRecord]: ...
    async def put_router(self, record: RouterRecord, lease_seconds: float) -> bool: ...
    async def remove_router(self, router_id: str, incarnation: str) -> bool: ...
    def changes(self) -> AsyncIterator[Members]: ...


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

    Args:
        fleet: takes the workers in, for placement.
        mode: which workers a model needs to be served.
    """

    def __init__(
        self,
        registry: Registry,
        router_id: str,
        signer: TicketSigner,
        metrics: RouterMetrics,
        clock: Clock,
        lease_seconds: float,
        fleet: Fleet,
        mode: Mode,
    ) -> None:
        self._fleet = fleet
        self._mode = mode
        self._registry = registry
        self._router_id = router_id
        self._signer = signer
        self._metrics = metrics
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._entries: dict[str, _Entry] = {}
        self._records: tuple[WorkerRecord, ...] = ()
        self._listeners: list[Callable[[], None]] = []
        self._unlisted = asyncio.Event()
        """There are links to workers that the registry does not have."""
        self.store_reachable = False
        self.routers = 1
        """Those that share the load, as the registry was last read."""

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        """The registry as it was last read."""
        return self._records

    def on_change(self, listener: Callable[[], None]) -> None:
        """Calls `listener` after a change of what can be placed on."""
        self._listeners.append(listener)

    def view(self) -> list[WorkerView]:
        """The workers with a link, as placement sees them."""
        return [entry.link.view for entry in self._entries.values()]

    def link(self, target: Target) -> WorkerLink | None:
        """The link to that life of that worker, if there is one."""
        entry = self._entries.get(target.worker_id)
        if entry is None or entry.link.record.incarnation != target.incarnation:
            return None
        return entry.link

    def missing(self, model: str) -> str:
        """What keeps `model` from being served, in words; empty if nothing does."""
        return missing(model, self.view(), self._mode)

    async def run(self) -> None:
        """Follows the registry until cancelled; the links end with it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_registry(tasks), name="registry")
            while True:
                await self._unlisted.wait()
                await asyncio.sleep(TICK_SECONDS)
                if self._drop_unlisted():
                    self._changed()

    async def _follow_registry(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            try:
                async for members in self._registry.changes():
                    self._reached(True)
                    self._count_routers(members.routers)
                    self._seen(members.workers, tasks)
            except PdserveError as error:
                self._reached(False, str(error))
            except Exception:
                log.exception("the registry could not be understood")
                self._reached(False, "the registry could not be understood")
            await asyncio.sleep(TICK_SECONDS)

    def _count_routers(self, records: Sequence[RouterRecord]) -> None:
        routers = max(1, sum(record.state == "ready" for record in records))
        if routers != self.routers:
            self.routers = routers
            self._changed()

    def _seen(self, records: Sequence[WorkerRecord], tasks: asyncio.TaskGroup) -> None:
        if tuple(records) == self._records:
            return
        for record in self._records:
            if entry := self._entries.get(record.worker_id):
                entry.listed_at = self._clock.now()
        self._records = tuple(records)
        for record in records:
            self._follow(record, tasks)
        self._drop_unlisted()
        self._changed()

    def _follow(self, record: WorkerRecord, tasks: asyncio.TaskGroup) -> None:
        entry = self._entries.get(record.worker_id)
        if entry is not None:
            old = entry.link.record
            if (old.incarnation, old.address) == (record.incarnation, record.address):
                entry.link.update(record)
                return
            self._close(entry)
        if record.address and record.state in ("ready", "draining"):
            link = WorkerLink(
                record, self._router_id, self._signer, self._changed, self._fleet, self._clock
            )
            task = tasks.create_task(link.run(), name=f"link {record.worker_id}")
            self._entries[record.worker_id] = _Entry(link, task, self._clock.now())

    def _drop_unlisted(self) -> bool:
        """Closes links to workers that were not listed for a lease, or that are down as well."""
        now = self._clock.now()
        listed = {record.worker_id for record in self._records}
        unlisted = [entry for name, entry in self._entries.items() if name not in listed]
        gone = [
            entry
            for entry in unlisted
            if not entry.link.connected or now - entry.listed_at > self._lease_seconds
        ]
        for entry in gone:
            self._close(entry)
        if len(gone) < len(unlisted):
            self._unlisted.set()
        else:
            self._unlisted.clear()
        return bool(gone)

    def _close(self, entry: _Entry) -> None:
        """The link's task fails what it carries when it ends."""
        self._entries.pop(entry.link.record.worker_id, None)
        entry.task.cancel()

    def _reached(self, reachable: bool, why: str = "") -> None:
        if self.store_reachable and not reachable:
            log.warning("store is out, serving from the last view: %s", why)
        if reachable and not self.store_reachable:
            log.info("store is reachable")
        self.store_reachable = reachable
        self._metrics.store_reachable.set(reachable)

    def _changed(self) -> None:
        self._metrics.count_workers(Counter((r.model, r.role, r.state) for r in self._records))
        for listener in self._listeners:
            listener()
