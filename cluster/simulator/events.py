"""The simulation's agenda: what happens when, in order, ties in the order of asking."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush


class Agenda:
    """Virtual time and what is due. `now` only grows."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Calls `call` at that time, or now if it has passed."""
        self._order += 1
        heappush(self._heap, (when, self._order, call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    @property
    def next_at(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def step(self) -> None:
        """Does what is due next."""
        when, _, call = heappop(self._heap)
        self.now = max(self.now, when)
        call()
