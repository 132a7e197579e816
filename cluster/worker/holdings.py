"""What a worker's engine holds, as metrics."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable

from prometheus_client import Counter, Gauge

from cluster.engine.protocol import Engine

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0

PINNED = Gauge("pdserve_kv_pinned_bytes", "KV bytes that handoffs pin.", ["role", "reason"])
FAULTS = Counter("pdserve_kv_ledger_faults_total", "Looks that found the ledger wrong.", ["role"])
LEAKED = Gauge(
    "pdserve_kv_blocks_leaked", "KV blocks that had to be reclaimed from handoffs.", ["role"]
)
AHEAD = Gauge(
    "pdserve_kv_ahead_bytes", "KV of prompts computed before decode had room for them.", ["role"]
)
WAITING = Gauge(
    "pdserve_kv_waiting_for_credit", "Prompts that wait for decode to have room.", ["role"]
)
BLOCKS_USED = Gauge("pdserve_kv_blocks_used", "KV blocks that requests hold.", ["role"])


class HoldingsMetrics:
    """Looks at the engine's holdings now and then, but not while it idles: asking wakes it.

    Args:
        role: the label of the gauges.
        busy: whether sequences run now.
    """

    def __init__(self, engine: Engine, role: str, busy: Callable[[], bool]) -> None:
        self._engine = engine
        self._role = role
        self._busy = busy
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        self._task.cancel()

    def change_role(self, role: str) -> None:
        """Under another label from now on; nothing is left under the former one."""
        for gauge in (PINNED, LEAKED, AHEAD, WAITING, BLOCKS_USED):
            gauge.remove_by_labels({"role": self._role})
        self._role = role

    async def _watch(self) -> None:
        look = True
        while True:
            busy = self._busy()
            if look or busy:
                try:
                    look = await self._look() or busy  # once more after the last sequence
                except Exception:
                    log.exception("holdings unknown")
                    FAULTS.labels(self._role).inc()
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
        LEAKED.labels(self._role).set(holdings.leaked_blocks)
        AHEAD.labels(self._role).set(holdings.ahead_bytes)
        WAITING.labels(self._role).set(holdings.waiting_for_credit)
        return bool(holdings.ledger or holdings.blocks_used)
