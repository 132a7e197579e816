"""The router's own record in the registry, renewed as long as it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from dataclasses import replace

from cluster.clock import Clock
from cluster.errors import PdserveError
from cluster.store.records import RouterRecord
from router.workers import STORE_TIMEOUT_SECONDS, Registry

log = logging.getLogger(__name__)


class RouterLease:
    """Keeps `record` in the registry. The data path does not depend on it."""

    def __init__(self, registry: Registry, record: RouterRecord, lease_seconds: float) -> None:
        self.record = record
        self._registry = registry
        self._lease_seconds = lease_seconds

    async def run(self) -> None:
        """Renews until cancelled; tries again when the store is out."""
        while True:
            await self._put()
            await asyncio.sleep(self._lease_seconds / 3)

    async def drain(self) -> None:
        """Tells the others that this router takes nothing in any more."""
        self.record = replace(self.record, state="draining")
        await self._put()

    async def remove(self) -> None:
        """Takes the record out; where the store is out the lease does it."""
        try:
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                await self._registry.remove_router(self.record.router_id, self.record.incarnation)
        except (PdserveError, TimeoutError) as error:
            log.info("router record left to expire: %s", error)

    async def _put(self) -> None:
        try:
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                if not await self._registry.put_router(self.record, self._lease_seconds):
                    log.warning("a newer life of %s is registered", self.record.router_id)
        except (PdserveError, TimeoutError) as error:
            log.info("router record not renewed: %s", error)


def record_of(
    router_id: str, incarnation: str, addresses: tuple[str, str, str], clock: Clock
) -> RouterRecord:
    """This process's own, as it starts to serve at its gRPC, HTTP and Operator addresses."""
    return RouterRecord(
        router_id,
        incarnation,
        *addresses,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=clock.wall(),
    )
