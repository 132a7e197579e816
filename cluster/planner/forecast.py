"""Forecasts of an arrival rate: Holt's damped trend, and Holt-Winters' seasons on top.

Both take rates of equal intervals and tell the level, and how far off they have been: the planner
adds that spread. Bad values are held out (`ignored`), never taken for zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

MEMORY = 60
"""Intervals over which it is learned how much of a rate's moves is taken back."""


class Forecast(Protocol):
    """What the planner asks about one class's rate, in requests/s."""

    def observe(self, rate: float) -> None:
        """The rate of one more interval."""
        ...

    def ahead(self, intervals: float) -> float:
        """The rate expected so many intervals from now; never negative, 0 before any value."""
        ...

    def highest(self, intervals: float, scatter: float = 0.0) -> float:
        """The highest rate expected from now until then.

        Args:
            scatter: standard deviation of the values about their rate: a trend that this alone
                would make is not drawn on.
        """
        ...

    @property
    def spread(self) -> float:
        """Standard deviation of the one-interval forecast's error."""
        ...

    @property
    def noise(self) -> float:
        """Standard deviation of the values about their rate, as they have shown it."""
        ...


@dataclass
class Holt:
    """Level and damped trend (Gardner and McKenzie, 1985), and the noise about them.

    Noise moves a value and the next one back: a step's covariance with the one before is −noise²,
    however the rate itself walks (Harvey, 1989, §2.4).

    Attributes:
        level_gain, trend_gain: weight of the newest value; `damping` is the share of the trend that
            survives an interval, so that a burst is not drawn on into the sky.
        last, step: the newest value, and how far it was from the one before.
        turned: of steps, the mean product with the one before, negated.
    """

    level_gain: float = 0.4
    trend_gain: float = 0.15
    damping: float = 0.9
    level: float = 0.0
    trend: float = 0.0
    variance: float = 0.0
    last: float = 0.0
    step: float = 0.0
    turned: float = 0.0
    count: int = 0
    ignored: int = 0

    def observe(self, rate: float) -> None:
        if not math.isfinite(rate) or rate < 0:
            self.ignored += 1
            return
        if self.count == 0:
            self.level = rate
        else:
            expected = self.level + self.damping * self.trend
            error = rate - expected
            before = self.level
            self.level = expected + self.level_gain * error
            step = self.level - before - self.damping * self.trend
            self.trend = self.damping * self.trend + self.trend_gain * step / self.level_gain
            gain = max(0.1, 1 / self.count)
            self.variance += gain * (error**2 - self.variance)
            before, self.step = self.step, rate - self.last
            self.turned -= (before * self.step + self.turned) / min(self.count, MEMORY)
        self.last = rate
        self.count += 1

    def ahead(self, intervals: float, scatter: float = 0.0) -> float:
        survives: float = self.damping**intervals
        reach = self.damping * (1 - survives) / (1 - self.damping)
        # The trend is a sum of errors, each weighted trend_gain and damped since.
        noise = scatter * self.trend_gain / math.sqrt(1 - self.damping**2)
        trend = self.trend if abs(self.trend) > noise else 0.0
        return max(0.0, self.level + reach * trend)

    def highest(self, intervals: float, scatter: float = 0.0) -> float:
        return max(self.ahead(0), self.ahead(intervals, scatter))

    @property
    def spread(self) -> float:
        return math.sqrt(self.variance)

    @property
    def noise(self) -> float:
        return math.sqrt(max(0.0, self.turned))


class Seasonal:
    """Holt plus an additive season, as Holt and Winters have it.

    Until one whole season was seen it is Holt alone.

    Args:
        period: intervals per season, such as a day's.
        gain: weight of the newest value in its phase's offset.
    """

    def __init__(self, period: int, gain: float = 0.3, trend: Holt | None = None) -> None:
        if period < 2:
            raise ValueError("a season has at least two intervals")
        self._period = period
        self._gain = gain
        self._holt = trend or Holt(level_gain=0.2, trend_gain=0.05)
        self._first: list[float] = []
        self._offsets: list[float] = []
        self._phase = 0

    @property
    def ignored(self) -> int:
        return self._holt.ignored

    def observe(self, rate: float) -> None:
        if not math.isfinite(rate) or rate < 0:
            self._holt.ignored += 1
            rate = self.ahead(1)  # the season goes on, at what was expected of it
        if not self._offsets:
            self._holt.observe(rate)
            self._first.append(rate)
            if len(self._first) == self._period:
                self._begin()
        else:
            offset = self._offsets[self._phase]
            self._holt.observe(max(0.0, rate - offset))
            self._offsets[self._phase] += self._gain * (rate - self._holt.level - offset)
        self._phase = (self._phase + 1) % self._period

    def _begin(self) -> None:
        mean = sum(self._first) / self._period
        self._offsets = [value - mean for value in self._first]
        self._holt.level, self._holt.trend, self._holt.variance = mean, 0.0, 0.0

    def ahead(self, intervals: float, scatter: float = 0.0) -> float:
        rate = self._holt.ahead(intervals, scatter)
        if self._offsets:
            rate += self._offsets[(self._phase + max(0, round(intervals) - 1)) % self._period]
        return max(0.0, rate)

    def highest(self, intervals: float, scatter: float = 0.0) -> float:
        steps = min(max(1, math.ceil(intervals)), self._period)
        return max(self.ahead(step, scatter) for step in range(1, steps + 1))

    @property
    def spread(self) -> float:
        return self._holt.spread

    @property
    def noise(self) -> float:
        return self._holt.noise
