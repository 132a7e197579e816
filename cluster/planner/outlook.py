"""What is expected of the traffic: learnt from every observation, told as demands by class.

Two outlooks. What is *feared* is the highest rate until a worker started now would serve, with the
forecast's error and the backlog: workers are raised for it. What has *come* is the level that the
rate has reached, with the same error: workers are kept for it. A burst moves the level by what it
was; its trend, drawn on, is a fear that the next intervals confirm or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.planner.demand import Demand, Lengths, RecentLengths
from cluster.planner.forecast import Forecast
from cluster.planner.performance import Performance
from cluster.planner.state import ClassTargets, Observed, Policy

SAMPLE = 96
"""Requests of a class that its lengths are planned with."""


@dataclass
class _Class:
    forecast: Forecast
    lengths: RecentLengths
    burstiness: float = 1.0

    def scatter(self, interval: float) -> float:
        """Standard deviation of an interval's count about its rate, both in requests/s."""
        return math.sqrt(self.forecast.ahead(0) * self.burstiness / interval)

    def unforeseen(self, interval: float) -> float:
        """Standard deviation of the rate itself about its forecast, requests/s.

        Counts scatter about their rate, and the queues are sized for that: it is no error of the
        forecast's.
        """
        return math.sqrt(max(0.0, self.forecast.spread**2 - self.scatter(interval) ** 2))


class Outlook:
    """The classes that were seen. `new_forecast` makes each one's."""

    def __init__(self, new_forecast: Callable[[], Forecast]) -> None:
        self._new_forecast = new_forecast
        self._classes: dict[str, _Class] = {}

    def learn(self, observed: Observed) -> None:
        """One more interval; its rates are finite."""
        for kind, traffic in observed.traffic.items():
            each = self._classes.get(kind)
            if each is None:
                each = self._classes[kind] = _Class(self._new_forecast(), RecentLengths())
            each.forecast.observe(traffic.rate)
            for lengths in traffic.lengths:
                each.lengths.observe(lengths)
            if math.isfinite(traffic.burstiness) and traffic.burstiness > 0:
                each.burstiness += 0.2 * (min(20.0, traffic.burstiness) - each.burstiness)

    def feared(
        self,
        policy: Policy,
        observed: Observed,
        performance: Performance,
        targets: Mapping[str, ClassTargets],
    ) -> dict[str, Demand]:
        """By class: the highest until a worker that is started now would serve, the forecast's
        error, and the rate that works the backlog off."""
        intervals = policy.cold_start / policy.interval
        rates = self._rates(
            policy, lambda each: each.forecast.highest(intervals, each.scatter(policy.interval))
        )
        samples = {kind: self._classes[kind].lengths.sample(SAMPLE) for kind in rates}
        backlog = _backlog_rate(policy, observed, performance, targets, samples)
        total = sum(rates.values())
        demands = {}
        for kind, rate in rates.items():
            share = rate / total if total else 1 / len(rates)
            demands[kind] = Demand(
                rate + backlog * share, samples[kind], self._classes[kind].burstiness
            )
        return demands

    def come(self, policy: Policy) -> dict[str, float]:
        """By class, requests/s: the level that the rate has reached, and the forecast's error."""
        return self._rates(policy, lambda each: each.forecast.ahead(0))

    def _rates(self, policy: Policy, of: Callable[[_Class], float]) -> dict[str, float]:
        return {
            kind: of(each) + policy.headroom * each.unforeseen(policy.interval)
            for kind, each in self._classes.items()
            if len(each.lengths)
        }


def _backlog_rate(
    policy: Policy,
    observed: Observed,
    performance: Performance,
    targets: Mapping[str, ClassTargets],
    samples: Mapping[str, tuple[Lengths, ...]],
) -> float:
    """Requests/s that work the backlog off in time. Prompts in service are no backlog: what the
    workers compute within the tightest TTFT is taken off."""
    new = [each.new for sample in samples.values() for each in sample]
    if not new or observed.queued_prompt_tokens <= 0:
        return 0.0
    mean = sum(new) / len(new)
    tightest = min(t.ttft for t in targets.values())
    ready = sum(w.phase == "ready" and w.role != "decode" for w in observed.workers)
    per_worker = min(tightest, 1.0) / performance.prefill_seconds(round(mean))
    waiting = observed.queued_prompt_tokens / mean - ready * max(1.0, per_worker)
    return max(0.0, waiting) / policy.recover_within
