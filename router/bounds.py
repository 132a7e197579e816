"""Bounds on the seconds per token, and how many sequences are to keep each. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

MAX_BOUNDS = 16


class Bounds:
    """The seconds per token that those who decode are to keep.

    At most `MAX_BOUNDS` different ones are kept apart, however many are asked for; one more counts
    as the next stricter of them, or the strictest.
    """

    def __init__(self) -> None:
        self._count: dict[float, int] = {}
        self._counted_as: dict[float, list[float]] = {}
        self.strictest = math.inf

    def __iter__(self) -> Iterator[tuple[float, int]]:
        """Each with its number of sequences, the strictest first."""
        return iter(sorted(self._count.items()))

    def add(self, seconds: float, sequences: int = 1) -> None:
        kept = seconds
        if seconds not in self._count and len(self._count) >= MAX_BOUNDS:
            stricter = [each for each in self._count if each < seconds]
            kept = max(stricter, default=self.strictest)
        self._counted_as.setdefault(seconds, []).append(kept)
        self._count[kept] = self._count.get(kept, 0) + sequences
        self.strictest = min(self.strictest, kept)

    def remove(self, seconds: float, sequences: int = 1) -> None:
        """One that was added."""
        kept = self._counted_as[seconds].pop()
        if not self._counted_as[seconds]:
            del self._counted_as[seconds]
        self._count[kept] -= sequences
        if not self._count[kept]:
            del self._count[kept]
            self.strictest = min(self._count, default=math.inf)
