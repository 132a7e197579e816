"""Admission: how many requests run, how many wait, and who is sent away. Pure."""

from __future__ import annotations

from collections import OrderedDict

from cluster.errors import Overloaded

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 30.0
_SMOOTHING = 0.1


class Admission:
    """First come, first served, within two limits.

    Args:
        max_running: requests that run at once.
        max_queued: requests that wait for one to end; beyond, `offer` refuses.
    """

    def __init__(self, max_running: int, max_queued: int) -> None:
        self._max_running = max_running
        self._max_queued = max_queued
        self._running: set[str] = set()
        self._queued: OrderedDict[str, float] = OrderedDict()
        self._last_release: float | None = None
        self._release_interval = MIN_RETRY_SECONDS

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queued)

    def check(self) -> None:
        """Raises Overloaded if `offer` would: so that refusing costs no tokenising."""
        if len(self._running) >= self._max_running and len(self._queued) >= self._max_queued:
            raise Overloaded(
                f"{len(self._running)} requests are running and {len(self._queued)} waiting, "
                "which is all this router takes",
                self.retry_after_seconds(),
            )

    def offer(self, now: float, request_id: str) -> bool:
        """True: it runs. False: it waits, until a `release` returns it.

        Raises:
            Overloaded: both limits are reached.
        """
        self.check()
        if len(self._running) < self._max_running:
            self._running.add(request_id)
            return True
        self._queued[request_id] = now
        return False

    def release(self, now: float, request_id: str) -> list[str]:
        """`request_id` has ended, run or not; returns the requests that run from now on."""
        self._queued.pop(request_id, None)
        if request_id not in self._running:
            return []
        self._running.discard(request_id)
        if self._last_release is not None:
            gap = now - self._last_release
            self._release_interval += _SMOOTHING * (gap - self._release_interval)
        self._last_release = now
        admitted = []
        while self._queued and len(self._running) < self._max_running:
            first, _ = self._queued.popitem(last=False)
            self._running.add(first)
            admitted.append(first)
        return admitted

    def retry_after_seconds(self) -> float:
        """When half of those waiting will have started, at the rate of late."""
        estimate = self._release_interval * max(1, len(self._queued) / 2)
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, estimate))
