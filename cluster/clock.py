"""Time as a parameter, so that every core runs under a virtual clock as it runs in production."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What the pure cores know of time."""

    def now(self) -> float:
        """Seconds that only grow; comparable within a host (CLOCK_MONOTONIC)."""
        ...

    def wall(self) -> float:
        """Seconds since 1970, for what crosses hosts, such as a ticket's expiry."""
        ...


class SystemClock:
    """The machine's clocks; read many times in a request, so that nothing stands before them."""

    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


class VirtualClock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 0.0, wall: float = 1_700_000_000.0) -> None:
        self._now = now
        self._wall_offset = wall - now

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now + self._wall_offset

    def advance(self, seconds: float) -> None:
        """Moves time forward by `seconds` >= 0."""
        if seconds < 0:
            raise ValueError("time does not run backwards")
        self._now += seconds
