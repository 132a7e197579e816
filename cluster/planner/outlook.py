"""What is expected of the traffic: learnt from every observation, told as demands by class.

Two outlooks. What has *come* is the rate at which the targets' share of the requests of late would
have been served: workers are kept for it. A target is a share of all requests, so a clump of
arrivals may be missed where those around it make up for it; and what a load has fallen by, over all
of its latest past and not in one step, has not come again. What is *feared* is that, or the
highest rate until a worker started now would serve with the forecast's error, and the backlog:
workers are raised for it. A trend, drawn on, is a fear that the next intervals confirm or not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from statistics import fmean

from cluster.planner.demand import Demand, Lengths, RecentLengths
from cluster.planner.forecast import Forecast
from cluster.planner.performance import Performance
from cluster.planner.state import ClassTargets, Observed, Policy

SAMPLE = 96
"""Requests of a class that its lengths are planned with."""
REMEMBERED = 720
"""Intervals whose rates are kept: an hour of 5 s each."""
PARTS = 12
"""Of the rates of late, by which a fall is told."""
FALLING = 0.65
"""The share of pairs of parts that a fall goes through; a single step down makes 0.62 at most."""


@dataclass
class _Class:
    forecast: Forecast
    lengths: RecentLengths
    burstiness: float = 1.0
    rates: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def scatter(self, interval: float) -> float:
        """Standard deviation of an interval's count about its rate, both in requests/s: what
        arrivals at random have, or more where they have shown it."""
        random = math.sqrt(self.forecast.ahead(0) * self.burstiness / interval)
        return max(random, self.forecast.noise)

    def unforeseen(self, interval: float) -> float:
        """Standard deviation of the rate itself about its forecast, requests/s.

        Counts scatter about their rate, and the queues are sized for that: it is no error of the
        forecast's.
        """
        return math.sqrt(max(0.0, self.forecast.spread**2 - self.scatter(interval) ** 2))

    def come(self, span: float, share: float) -> float:
        """The rate that would have served a share of the requests of the last `span` seconds, or of
        all that is remembered, if that is less: what is missed now may be made up for by then; or
        of the last `span` seconds less what they have fallen since."""
        since = self.rates[-1][0] - span
        late = [(at, rate) for at, rate in self.rates if at > since]
        spans = ([rate for _, rate in late], [rate for _, rate in self.rates], fallen(late))
        return min(rate_serving(rates, share) for rates in spans)


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
            each.rates.append((observed.measured_at, traffic.rate))
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
        span: float,
    ) -> dict[str, Demand]:
        """By class: the highest until a worker that is started now would serve, with the forecast's
        error, or what has come within `span` seconds; and the rate that works the backlog off."""
        intervals, rates = policy.cold_start / policy.interval, self.come(targets, span)
        for kind, come in rates.items():
            each = self._classes[kind]
            highest = each.forecast.highest(intervals, each.scatter(policy.interval))
            error = policy.headroom * each.unforeseen(policy.interval)
            rates[kind] = max(come, highest + error)
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

    def come(self, targets: Mapping[str, ClassTargets], span: float) -> dict[str, float]:
        """By class, requests/s: what would have served the targets' share, but for what the queues
        may miss of it, of the requests of the last `span` seconds."""
        return {
            kind: each.come(span, math.sqrt((targets.get(kind) or targets[""]).share))
            for kind, each in self._classes.items()
            if len(each.lengths)
        }


def rate_serving(rates: Iterable[float], share: float) -> float:
    """The least rate R with Σ min(rate, R) ≥ share · Σ rate, over equal intervals."""
    ordered = sorted(rates)
    wanted = share * sum(ordered)
    for done, rate in enumerate(ordered):
        left = len(ordered) - done
        if wanted <= rate * left:
            return wanted / left
        wanted -= rate
    return ordered[-1] if ordered else 0.0  # only rounding was still wanted


def fallen(rates: Sequence[tuple[float, float]]) -> list[float]:
    """Rates, given with their times, lowered by what their trend has fallen since.

    Of their means over `PARTS` equal parts, `FALLING` of all pairs fall at least as steeply: more
    than any one step down makes, or than noise does. As they are where that is no fall, and where
    they are too few.
    """
    plain = [rate for _, rate in rates]
    ends = [len(rates) * part // PARTS for part in range(PARTS + 1)]
    parts = [rates[start:end] for start, end in pairwise(ends) if end > start]
    means = [(fmean(at for at, _ in part), fmean(rate for _, rate in part)) for part in parts]
    slopes = sorted((b - a) / (t - s) for (s, a), (t, b) in combinations(means, 2) if t > s)
    if len(means) < PARTS or not slopes or (slope := slopes[int(FALLING * len(slopes))]) >= 0:
        return plain
    return [max(0.0, rate + slope * (rates[-1][0] - at)) for at, rate in rates]


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
