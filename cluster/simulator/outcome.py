"""What became of simulated requests: attainment and percentiles by the design's definitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.planner.calibrate import quantile


@dataclass(frozen=True)
class Targets:
    """What every request is to meet, in seconds; infinity asks for nothing."""

    ttft: float
    tpot: float

    def __str__(self) -> str:
        both = (("TTFT", self.ttft), ("TPOT", self.tpot))
        return " and ".join(f"{name} ≤ {t:g} s" for name, t in both if math.isfinite(t))


def parse_slo(text: str) -> Targets:
    """`ttft=0.5,tpot=0.05`, in seconds; one of the two may be left out.

    Raises:
        InvalidRequest: anything else.
    """
    values = {"ttft": math.inf, "tpot": math.inf}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if name not in values or not seconds > 0 or math.isinf(seconds):
            raise InvalidRequest("slo", f"{part!r} is not ttft=SECONDS or tpot=SECONDS")
        values[name] = seconds
    return Targets(**values)


@dataclass(frozen=True)
class Outcome:
    """One request's end.

    Attributes:
        ttft, tpot: seconds; infinite for a request that was refused or failed.
        ended_at: when its last token, its refusal or its error came; infinite: not yet.
        error: empty for a success.
    """

    kind: str
    at: float
    prompt: int
    output: int
    ttft: float = math.inf
    tpot: float = math.inf
    ended_at: float = math.inf
    cached: int = 0
    retries: int = 0
    error: str = ""

    def meets(self, targets: Targets) -> bool:
        return self.ttft <= targets.ttft and self.tpot <= targets.tpot


def attainment(outcomes: Sequence[Outcome], targets: Targets | Mapping[str, Targets]) -> float:
    """Requests that met all their targets ÷ all offered; NaN of none.

    Args:
        targets: for all, or by kind.
    """
    if not outcomes:
        return math.nan
    if isinstance(targets, Targets):
        return sum(o.meets(targets) for o in outcomes) / len(outcomes)
    return sum(o.meets(targets[o.kind]) for o in outcomes) / len(outcomes)


@dataclass(frozen=True)
class Percentiles:
    """Of the requests that succeeded, in seconds; NaN of none."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        ordered = sorted(v for v in values if math.isfinite(v))
        return cls(*(quantile(ordered, q) for q in (0.5, 0.9, 0.99)))


def ttft(outcomes: Iterable[Outcome]) -> Percentiles:
    """Time to first token."""
    return Percentiles.of(o.ttft for o in outcomes)


def tpot(outcomes: Iterable[Outcome]) -> Percentiles:
    """Time per output token, of requests with two tokens or more."""
    return Percentiles.of(o.tpot for o in outcomes if o.output > 1)
