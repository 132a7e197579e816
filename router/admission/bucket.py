"""A token bucket that may go into debt: what a request uses is known only when it has ended."""

from __future__ import annotations

import math


class Bucket:
    """Fills at `rate` a second up to `burst`; with an infinite rate it never empties.

    A taker needs one full unit, or all of a smaller bucket, and may then take more than there is:
    the next ones wait until the debt is paid. So a request larger than the burst is served, and
    the long-run rate still holds.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at: float | None = None

    def resize(self, now: float, rate: float, burst: float) -> None:
        """Goes on with another rate; what there is stays, as far as it fits."""
        self._settle(now)
        self._rate, self._burst = rate, burst
        self._level = min(self._level, burst)

    def wait_seconds(self, now: float) -> float:
        """Until something may be taken; 0: now."""
        if math.isinf(self._rate):
            return 0.0
        self._settle(now)
        lacking = min(1.0, self._burst) - self._level
        # Less than a thousandth of a unit is the rounding of a wait that was just waited.
        return lacking / self._rate if lacking > 1e-3 else 0.0

    def take(self, now: float, amount: float) -> None:
        """Takes `amount`; a negative one gives back."""
        if not math.isinf(self._rate):
            self._settle(now)
            self._level = min(self._burst, self._level - amount)

    def _settle(self, now: float) -> None:
        if self._at is not None and not math.isinf(self._rate):
            filled = self._level + max(0.0, now - self._at) * self._rate
            self._level = min(self._burst, filled)
        self._at = now
