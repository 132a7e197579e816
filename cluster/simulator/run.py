"""A run of steps of one engine: when each of them ends, at a pace that may change on the way."""

from __future__ import annotations

import math


class Run:
    """So many steps, one after another; `steps` is 0 while the engine has nothing to do.

    Alone on its cores a run's first step takes `first` seconds and every further one `growth` more
    than the one before: its own time. What shares the cores slows it: its own time then passes at
    1/pace of the clock's.

    Attributes:
        began: when its first step did.
        ends_at: when its last step will, at the present pace; infinite without a run.
    """

    __slots__ = ("_done", "_first", "_growth", "_pace", "_since", "began", "ends_at", "steps")

    def __init__(self) -> None:
        self.began = self._since = 0.0
        self.steps = 0
        self.ends_at = math.inf
        self._first = self._growth = self._done = 0.0
        self._pace = 1.0

    def begin(self, now: float, steps: int, first: float, growth: float = 0.0) -> None:
        """So many steps begin, none of them if 0; the pace stays what it was."""
        self.began = self._since = now
        self.steps, self._first, self._growth, self._done = steps, first, growth, 0.0
        self.ends_at = now + self._own(steps) * self._pace if steps else math.inf

    def end(self) -> int:
        """It has ended; how many steps it had."""
        steps, self.steps = self.steps, 0
        return steps

    def cut(self, now: float) -> None:
        """Lets it end with the step that is under way."""
        done = self.steps_by(now) + 1
        if done < self.steps:
            self.steps = done
            self._set_end(now)

    def set_pace(self, now: float, pace: float) -> bool:
        """From now on the clock's seconds are so many times its own; True if that moves its end."""
        if pace == self._pace:
            return False
        if not self.steps:
            self._pace = pace
            return False
        self._done = self._own_by(now)
        self._since, self._pace = now, pace
        self._set_end(now)
        return True

    def lose(self, now: float, seconds: float) -> None:
        """The clock goes on for so many seconds, and it does not."""
        self._done = self._own_by(now) - seconds / self._pace
        self._since = now
        self._set_end(now)

    def steps_by(self, now: float) -> int:
        """Whole steps that have ended by then."""
        elapsed, first, growth = max(0.0, self._own_by(now)), self._first, self._growth
        if growth <= first * 1e-9:
            steps = elapsed / first if first > 0 else self.steps
        else:
            b = first - growth / 2
            steps = (math.sqrt(b * b + 2 * growth * elapsed) - b) / growth
        return min(self.steps, int(steps + 1e-9))

    def _set_end(self, now: float) -> None:
        left = self._own(self.steps) - self._done
        self.ends_at = max(now, self._since + left * self._pace)

    def _own(self, steps: int) -> float:
        """Own seconds of the first so many: an arithmetic series."""
        return steps * self._first + self._growth * steps * (steps - 1) / 2

    def _own_by(self, now: float) -> float:
        return self._done + (now - self._since) / self._pace
