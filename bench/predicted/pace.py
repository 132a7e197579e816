"""How fast the machine itself is at the moment: a virtual machine's cores are shared with others,
and a profile says nothing of an hour in which they are slower."""

from __future__ import annotations

import hashlib
import time

RUNS = 7


class Pace:
    """Measured at rest, between loads; each relative to the first.

    Attributes:
        found: shares of the first pace, in the order measured.
    """

    def __init__(self) -> None:
        self._first = _seconds()
        self.found: list[float] = []

    def measure(self) -> float:
        """The pace now: 0.8 is a fifth less work in the same time."""
        self.found.append(self._first / _seconds())
        return self.found[-1]

    def __str__(self) -> str:
        return " ".join(f"{pace:.2f}" for pace in self.found)


def _seconds() -> float:
    """Of a fixed computation on one core, interpreter and memory, the best of some runs."""
    data, best = bytes(4 << 20), float("inf")
    for _ in range(RUNS):
        began = time.perf_counter()
        hashlib.blake2b(data).digest()
        sum(i * i for i in range(100_000))
        best = min(best, time.perf_counter() - began)
    return best
