"""The store as the controller sees it: connected to when it answers, members as last read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from cluster.config import Config
from cluster.control.reconcile import Lease, SlotState
from cluster.control.status import Running, waiting_workers
from cluster.errors import Unavailable
from cluster.store.client import connect
from cluster.store.plan_records import WaitingWorker
from cluster.store.plans import Plans
from cluster.store.registry import Members, Registry

WAITING_SECONDS = 30.0
"""What a controller that has died said of the waiting counts for so long."""


class StoreView:
    """Attributes:
    members: None while the store is out.
    plans: None before it has answered once.
    """

    def __init__(self, url: str, config: Callable[[], Config]) -> None:
        self._url = url
        self._config = config
        self._registry: Registry | None = None
        self.plans: Plans | None = None
        self.members: Members | None = None
        self._told: Sequence[WaitingWorker] = ()
        self._tell_again = 0.0

    async def read(self) -> Members:
        """The members now. Raises Unavailable."""
        config = self._config()
        try:
            if self._registry is None:
                client = await connect(self._url, config.store.connect_timeout_seconds)
                self._registry = Registry(client, config.name)
                self.plans = Plans(client, config.name)
            self.members = await self._registry.members()
        except Unavailable:
            self.members = None
            raise
        return self.members

    @property
    def known(self) -> bool:
        """It has answered once."""
        return self._registry is not None

    async def tell_waiting(
        self, now: float, slots: Mapping[str, SlotState], lives: Mapping[str, Running]
    ) -> None:
        """Which workers have not registered and why, for whoever asks a router."""
        if self.plans is None or self.members is None:
            return
        waiting = waiting_workers(now, slots, lives, self.members)
        if waiting != self._told or now >= self._tell_again:
            with suppress(Unavailable):
                await self.plans.tell_waiting(waiting, WAITING_SECONDS)
                self._told, self._tell_again = waiting, now + WAITING_SECONDS / 3

    async def drop(self, lease: Lease) -> None:
        """Removes a member whose process is gone. Raises Unavailable."""
        if self._registry is None:
            return
        if lease.kind == "worker":
            await self._registry.remove_worker(lease.slot_id, lease.incarnation)
        else:
            await self._registry.remove_router(lease.slot_id, lease.incarnation)
