"""The store as the controller sees it: connected to when it answers, members as last read."""

from __future__ import annotations

from collections.abc import Callable

from cluster.config import Config
from cluster.control.reconcile import Lease
from cluster.errors import Unavailable
from cluster.store.client import connect
from cluster.store.plans import Plans
from cluster.store.registry import Members, Registry


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

    async def drop(self, lease: Lease) -> None:
        """Removes a member whose process is gone. Raises Unavailable."""
        if self._registry is None:
            return
        if lease.kind == "worker":
            await self._registry.remove_worker(lease.slot_id, lease.incarnation)
        else:
            await self._registry.remove_router(lease.slot_id, lease.incarnation)
