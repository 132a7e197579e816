"""A load's row: what was predicted, what was measured, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench import tables
from bench.predicted.clients import Seen
from cluster.planner.calibrate import quantile
from cluster.planner.performance import Performance
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Outcome, Percentiles, Targets, attainment, tpot, ttft
from cluster.simulator.workload import Arrival
from cluster.simulator.world import World
from router.placement import Mode

LOOSE = 2.0
"""Targets, as multiples of what one request alone is predicted to take."""


@dataclass(frozen=True)
class Split:
    """A prefill and a decode worker, simulated."""

    worker: Performance
    limits: EngineLimits
    mode: Mode

    def predict(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        split = Deployment(self.worker, 1, 1, 0, self.limits, placement_mode=self.mode)
        return World(split).run(arrivals)

    def targets(self, prompt: int, output: int) -> Targets:
        (alone,) = self.predict([Arrival(0.0, prompt, output)])
        return Targets(LOOSE * alone.ttft, LOOSE * alone.tpot)


@dataclass(frozen=True)
class Times:
    """Of TTFT and TPOT, seconds; the share in time."""

    ttft: Percentiles
    tpot: Percentiles
    in_time: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], targets: Targets) -> Times:
        return cls(ttft(outcomes), tpot(outcomes), attainment(outcomes, targets))

    def off(self, measured: Times) -> list[float]:
        """Relative errors of the p50 and p90 of both."""
        pairs = ((self.ttft, measured.ttft), (self.tpot, measured.tpot))
        return [
            abs(p / m - 1)
            for predicted, seen in pairs
            for p, m in ((predicted.p50, seen.p50), (predicted.p90, seen.p90))
        ]


@dataclass(frozen=True)
class Row:
    """One workload at one rate.

    Attributes:
        failed: of the requests that were sent.
        again: what the same arrivals took the second time, where they were sent twice.
    """

    workload: str
    rate: float
    requests: int
    failed: int
    targets: Targets
    predicted: Times
    measured: Times
    again: Times | None = None

    def sent_again(self, seen: Sequence[Seen]) -> Row:
        return replace(self, again=Times.of([s.outcome for s in seen], self.targets))


def row_of(
    split: Split, workload: str, means: tuple[int, int], rate: float, seen: Sequence[Seen]
) -> Row:
    """What the split was predicted to make of the arrivals that were sent, and what it made."""
    targets = split.targets(*means)
    predicted = split.predict([s.arrival for s in seen])
    measured = [s.outcome for s in seen]
    failed = sum(bool(s.error) for s in seen)
    times = (Times.of(predicted, targets), Times.of(measured, targets))
    return Row(workload, rate, len(seen), failed, targets, *times)


HEAD = ["workload", "req/s", "n", "TTFT p50/p90 predicted", "measured",
        "TPOT p50/p90 predicted", "measured", "in time predicted", "measured"]  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Milliseconds, and under it how far the rows are off."""
    lines = [
        [
            row.workload,
            f"{row.rate:.1f}",
            f"{row.requests}" + (f", {row.failed} failed" if row.failed else ""),
            *(
                f"{p.p50 * 1e3:.1f}/{p.p90 * 1e3:.1f}"
                for p in (
                    row.predicted.ttft, row.measured.ttft, row.predicted.tpot, row.measured.tpot
                )
            ),
            f"{row.predicted.in_time:.0%}",
            f"{row.measured.in_time:.0%}",
        ]
        for row in rows
    ]  # fmt: skip
    text = tables.table(HEAD, lines)
    if errors := _finite(e for row in rows for e in row.predicted.off(row.measured)):
        text += f"\n\nms. Error: median {median(errors):.0%}, p90 {quantile(errors, 0.9):.0%}"
    if scatter := _finite(e for r in rows if r.again for e in r.again.off(r.measured)):
        text += (
            "\nMiddle rates measured again: off the first time by "
            f"{median(scatter):.0%} in the median, {quantile(scatter, 0.9):.0%} at p90"
        )
    return text


def _finite(errors: Iterable[float]) -> list[float]:
    return sorted(e for e in errors if math.isfinite(e))
