"""Keeps a performance current from measured steps, and knows how wrong it has been of late."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.planner.performance import Performance
from cluster.planner.sharing import Beside, slowed

MEMORY_SAMPLES = 200
"""A sample's weight falls to 1/e after so many more."""
MAX_RATIO = 4.0
"""A step that took more than so many times its prediction, or less, counts as that many: a stall of
the machine is not the model's speed."""
TRUSTED_SAMPLES = 20
"""Fewer say nothing about the error."""


@dataclass
class _Drift:
    """Of one kind of step: the running mean of log(measured/predicted), and of its residual."""

    log_ratio: float = 0.0
    residual: float = 0.0
    samples: int = 0
    ignored: int = 0

    def observe(self, predicted: float, measured: float) -> None:
        if not (math.isfinite(measured) and measured > 0 and predicted > 0):
            self.ignored += 1
            return
        bound = math.log(MAX_RATIO)
        value = max(-bound, min(bound, math.log(measured / predicted)))
        self.samples += 1
        weight = max(1 / self.samples, 1 / MEMORY_SAMPLES)
        self.residual += weight * (abs(value - self.log_ratio) - self.residual)
        self.log_ratio += weight * (value - self.log_ratio)

    @property
    def error(self) -> float:
        return math.expm1(self.residual) if self.samples >= TRUSTED_SAMPLES else math.nan


class OnlinePerformance:
    """A performance and what measured steps say about it.

    Steps are compared with those of `base` as slow as what is beside it makes them; `current` has
    the drift taken out, and its contention still to be counted. It belongs to one model, hardware
    and layout, as its base does.
    """

    def __init__(self, base: Performance) -> None:
        self.base = self._expected = base
        self._prefill = _Drift()
        self._decode = _Drift()

    def shares(self, beside: Beside) -> None:
        """What runs beside the workers whose steps are measured from now on."""
        self._expected = slowed(self.base, beside)

    def prefill_measured(self, new: int, cached: int, seconds: float) -> None:
        """A prompt's prefill took so long in its step, without its wait."""
        self._prefill.observe(self._expected.prefill_seconds(new, cached), seconds)

    def decode_measured(self, batch: int, context: float, seconds: float) -> None:
        """A decode step took so long."""
        self._decode.observe(self._expected.decode_seconds(batch, context), seconds)

    @property
    def current(self) -> Performance:
        """The base, scaled by the drift."""
        return self.base.scaled(math.exp(self._prefill.log_ratio), math.exp(self._decode.log_ratio))

    @property
    def prefill_error(self) -> float:
        """Mean relative error of late, after the drift is taken out; NaN until it is known."""
        return self._prefill.error

    @property
    def decode_error(self) -> float:
        """As `prefill_error`."""
        return self._decode.error

    @property
    def ignored(self) -> int:
        """Measurements that were NaN, infinite or not positive."""
        return self._prefill.ignored + self._decode.ignored
