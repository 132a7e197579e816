"""Handoff results by handoff, as they come out of the engine's ranks."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import replace

from cluster.kv.handoff import HandoffResult

MAX_UNCLAIMED = 4096


class HandoffResults:
    """Waits for every rank's part and joins them: bytes add up, the first error counts.

    Args:
        ranks: parts that make a whole.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._parts: OrderedDict[str, list[HandoffResult]] = OrderedDict()
        self._waiters: dict[str, asyncio.Future[HandoffResult]] = {}

    def add(self, part: HandoffResult) -> None:
        parts = self._parts.setdefault(part.handoff_id, [])
        parts.append(part)
        while len(self._parts) > MAX_UNCLAIMED:
            self._parts.popitem(last=False)
        waiter = self._waiters.get(part.handoff_id)
        if waiter is not None and not waiter.done() and self._whole(parts):
            waiter.set_result(_join(parts))

    async def wait(self, handoff_id: str) -> HandoffResult:
        """The joined result; any rank's failure ends the wait at once."""
        parts = self._parts.get(handoff_id, [])
        if self._whole(parts):
            return _join(parts)
        waiter = self._waiters.get(handoff_id)
        if waiter is None:
            waiter = self._waiters[handoff_id] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(waiter)

    def forget(self, handoff_id: str) -> None:
        self._parts.pop(handoff_id, None)
        if waiter := self._waiters.pop(handoff_id, None):
            waiter.cancel()

    def _whole(self, parts: list[HandoffResult]) -> bool:
        return len(parts) >= self._ranks or any(part.error for part in parts)


def _join(parts: list[HandoffResult]) -> HandoffResult:
    first = parts[0]
    return replace(
        first,
        error=next((part.error for part in parts if part.error), ""),
        bytes=sum(part.bytes for part in parts),
        frames=sum(part.frames for part in parts),
        granted_at=min(part.granted_at for part in parts),
        first_frame_at=min(part.first_frame_at for part in parts),
        last_frame_at=max(part.last_frame_at for part in parts),
        ended_at=max(part.ended_at for part in parts),
    )
