"""What a worker's engine holds, as metrics."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict

from prometheus_client import Gauge

from cluster.engine.protocol import Engine
from cluster.errors import PdserveError

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0

PINNED = Gauge("pdserve_kv_pinned_bytes", "KV bytes that handoffs pin.", ["role", "reason"])
BLOCKS_USED = Gauge("pdserve_kv_blocks_used", "KV blocks that requests hold.", ["role"])


class HoldingsMetrics:
    """Looks at the engine's holdings now and then.

    Args:
        role: the label of the gauges.
    """

    def __init__(self, engine: Engine, role: str) -> None:
        self._engine = engine
        self._role = role
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except PdserveError as error:
                log.warning("holdings unknown: %s", error)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _look(self) -> None:
        holdings = await self._engine.holdings()
        by_reason: dict[str, int] = defaultdict(int, sending=0, reserved=0)
        for pinned in holdings.ledger:
            by_reason[pinned.reason] += pinned.bytes
        for reason, size in by_reason.items():
            PINNED.labels(self._role, reason).set(size)
        BLOCKS_USED.labels(self._role).set(holdings.blocks_used)
