"""Cancel by name: the request may run on another router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from cluster.errors import PdserveError

AGAIN_SECONDS = 1.0

log = logging.getLogger(__name__)


class Cancellations(Protocol):
    """The store's; raises Unavailable while it is out."""

    async def ask(self, tenant: str, request_id: str) -> bool: ...
    async def serve(self, cancel: Callable[[str, str], bool]) -> None: ...


class Canceller:
    """Cancels here, or where it runs.

    Args:
        here: cancels a tenant's request; False if it does not run on this router.
        store: None where no other router can be reached.
    """

    def __init__(self, here: Callable[[str, str], bool], store: Cancellations | None) -> None:
        self._here = here
        self._store = store

    async def cancel(self, tenant: str, request_id: str) -> bool:
        """False if the tenant has no such request running anywhere.

        Raises:
            Unavailable: not here, and the store, over which others are asked, is out.
        """
        if self._here(tenant, request_id):
            return True
        return self._store is not None and await self._store.ask(tenant, request_id)

    async def serve(self) -> None:
        """Hears of what other routers were asked to cancel, until cancelled."""
        while self._store is not None:
            try:
                await self._store.serve(self._here)
            except PdserveError as error:
                log.info("cancellations of other routers are not heard: %s", error)
            except Exception:
                log.exception("a cancellation could not be understood")
            await asyncio.sleep(AGAIN_SECONDS)
