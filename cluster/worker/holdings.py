"""What a worker's engine holds, as metrics."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from prometheus_client import Gauge

from cluster.engine.protocol import Engine
from cluster.errors import PdserveError

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0

PINNED = Gauge("pdserve_kv_pinned_bytes", "KV bytes that handoffs pin.", ["role", "reason"])
BLOCKS_USED = Gauge("pdserve_kv_blocks_used", "KV blocks that requests hold.", ["role"])


class HoldingsMetrics:
    """Looks at the engine's holdings now and then, but not while it idles: asking wakes it.

    Args:
        role: the label of the gauges.
        served: sequences taken so far.
    """

    def __init__(self, engine: Engine, role: str, served: Callable[[], int]) -> None:
        self._engine = engine
        self._role = role
        self._served = served
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        seen, holds = -1, True
        while True:
            served = self._served()
            if holds or served != seen:
                seen = served
                try:
                    holds = await self._look()
                except PdserveError as error:
                    log.warning("holdings unknown: %s", error)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _look(self) -> bool:
        """Sets the gauges; True if something is held."""
        holdings = await self._engine.holdings()
        by_reason: dict[str, int] = defaultdict(int, sending=0, reserved=0)
        for pinned in holdings.ledger:
            by_reason[pinned.reason] += pinned.bytes
        for reason, size in by_reason.items():
            PINNED.labels(self._role, reason).set(size)
        BLOCKS_USED.labels(self._role).set(holdings.blocks_used)
        return bool(holdings.ledger or holdings.blocks_used)
