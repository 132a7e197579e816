"""Curves that learn: seconds over a size, one per worker, from what was observed. Pure.

A curve is piecewise linear between knots at powers of two, in logarithms on both axes, so that it
is positive and keeps one relative accuracy from 16 tokens to a million. An observation pulls the
two knots around it; knots that have seen nothing yet move along with it, so that one observation
sets the scale of a worker that nothing is known of.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_GAIN = 0.08
"""Weight of an observation at a knot that has seen many."""

STALE_SECONDS, FADE_SECONDS = 10.0, 20.0
"""A row that nothing was seen of for so long forgets, with this time constant, in seconds in which
there were requests."""

MAX_RATIO = 8.0
"""One observation counts as no further off than this factor, once a knot has seen some."""


class Curves:
    """One curve per row.

    Args:
        first, knots: the first knot is at size 2^first; there are so many.
        prior: seconds at a size, for rows that nothing is known of.
    """

    def __init__(self, first: int, knots: int, prior: Callable[[float], float]) -> None:
        self._first = first
        self._last = first + knots - 1
        self._prior = np.array([math.log(prior(2.0 ** (first + i))) for i in range(knots)])
        self._logs = np.empty((0, knots))
        self._seen = np.empty((0, knots))
        self._age = np.empty(0)
        self.version = 0
        """Changes when something was learned or forgotten."""

    def resize(self, rows: int) -> None:
        """More rows, at the prior."""
        self.version += 1
        more = rows - len(self._logs)
        # By columns, because `at` reads two of them.
        logs = np.vstack([self._logs, np.tile(self._prior, (more, 1))])
        self._logs = np.asfortranarray(logs)
        self._seen = np.vstack([self._seen, np.zeros((more, len(self._prior)))])
        self._age = np.concatenate([self._age, np.zeros(more)])

    def reset(self, row: int, like: list[int]) -> None:
        """A new worker in `row`: as the mean of the rows `like`, or the prior; it unlearns fast."""
        self.version += 1
        learned = [r for r in like if r != row and self._seen[r].any()]
        self._logs[row] = self._logs[learned].mean(axis=0) if learned else self._prior
        self._seen[row] = 0
        self._age[row] = 0

    def fade(self, seconds: float, rows: NDArray[np.intp]) -> None:
        """Time goes by for `rows`, which do the same work: who was not seen for long drifts towards
        those who were. Else a worker that was slow once would be passed over for ever, and so never
        be seen to be fast again."""
        self.version += 1
        self._age[rows] += seconds
        stale = rows[(self._age[rows] > STALE_SECONDS) & self._seen[rows].any(axis=1)]
        fresh = rows[(self._age[rows] <= STALE_SECONDS) & self._seen[rows].any(axis=1)]
        if stale.size and fresh.size:
            kept = math.exp(-seconds / FADE_SECONDS)
            self._logs[stale] += (1 - kept) * (self._logs[fresh].mean(axis=0) - self._logs[stale])
            self._seen[stale] *= kept

    def follow(self, rows: NDArray[np.intp]) -> None:
        """Of `rows` alike, those that nothing was seen of are as the mean of those that were."""
        seen = self._seen[rows].any(axis=1)
        if seen.any() and not seen.all():
            self.version += 1
            self._logs[rows[~seen]] = self._logs[rows[seen]].mean(axis=0)

    def adopt(self, row: int, like: list[int]) -> None:
        """A worker that has not done this yet is about to: as `reset`."""
        if not self._seen[row].any():
            self.reset(row, like)

    def at(self, size: float, rows: slice | NDArray[np.intp]) -> Floats:
        """Seconds at one size, for many rows."""
        knot, part = self._locate(size)
        left, right = self._logs[rows, knot], self._logs[rows, knot + 1]
        seconds: Floats = np.exp(left * (1 - part) + right * part)
        return seconds

    def for_all(self, size: float, rows: int) -> list[float]:
        """As `at`, of the first rows, for few of them."""
        knot, part = self._locate(size)
        lefts, rights = self._logs[:rows, knot].tolist(), self._logs[:rows, knot + 1].tolist()
        return [
            math.exp(left + part * (right - left))
            for left, right in zip(lefts, rights, strict=True)
        ]

    def each(self, sizes: Floats, rows: NDArray[np.intp]) -> Floats:
        """Seconds at a size per row."""
        place = np.clip(np.log2(np.maximum(sizes, 1.0)), self._first, self._last - 1e-9)
        knots = place.astype(np.intp)
        part = place - knots
        knots -= self._first
        left, right = self._logs[rows, knots], self._logs[rows, knots + 1]
        seconds: Floats = np.exp(left + part * (right - left))
        return seconds

    def within(self, seconds: float, rows: NDArray[np.intp]) -> Floats:
        """The largest size per row up to which it takes no longer; 0: the smallest takes longer."""
        # A larger size takes no less time than a smaller one, whatever was seen of it.
        logs = np.maximum.accumulate(self._logs[rows], axis=1)
        limit = math.log(seconds)
        below = (logs <= limit).sum(axis=1)
        left = np.clip(below - 1, 0, logs.shape[1] - 2)
        row = np.arange(len(rows))
        rise = np.maximum(logs[row, left + 1] - logs[row, left], 1e-12)
        part = np.clip((limit - logs[row, left]) / rise, 0.0, 1.0)
        sizes: Floats = np.where(below > 0, 2.0 ** (self._first + left + part), 0.0)
        return sizes

    def one(self, size: float, row: int) -> float:
        """Seconds at one size, for one row."""
        knot, part = self._locate(size)
        left, right = self._logs.item(row, knot), self._logs.item(row, knot + 1)
        return math.exp(left + part * (right - left))

    def observe(self, row: int, size: float, seconds: float) -> None:
        """`row` took so long at this size."""
        self.version += 1
        knot, part = self._locate(size)
        logs, seen = self._logs[row].tolist(), self._seen[row].tolist()
        self._age[row] = 0
        here = logs[knot] + part * (logs[knot + 1] - logs[knot])
        off = math.log(max(seconds, 1e-6)) - here
        if seen[knot] + seen[knot + 1] > 4:
            off = max(-math.log(MAX_RATIO), min(math.log(MAX_RATIO), off))
        gain = max(MIN_GAIN, 1.0 / (1.0 + seen[knot] * (1 - part) + seen[knot + 1] * part))
        # Moves of both knots that change the value between them by gain · off.
        weight = gain / ((1 - part) ** 2 + part**2)
        for i, count in enumerate(seen):
            if i == knot or i == knot + 1:
                share = part if i > knot else 1 - part
                logs[i] += weight * share * off
                seen[i] = count + share
            elif not count:
                logs[i] += gain * off
        self._logs[row], self._seen[row] = logs, seen

    def _locate(self, size: float) -> tuple[int, float]:
        place = math.log2(size) if size > 1 else 0.0
        place = min(max(place, self._first), self._last - 1e-9)
        knot = int(place)
        return knot - self._first, place - knot
