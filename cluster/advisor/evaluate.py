"""One option's answer: its goodput, and how attainment falls with the rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cluster.advisor.question import Option, Question, window
from cluster.simulator.goodput import Goal
from cluster.simulator.outcome import Outcome, Percentiles, Targets
from cluster.simulator.workload import Arrival, at_rate, mean_rate
from cluster.simulator.world import World

RUN_SECONDS = 15.0
"""A run lasts so long at least: shorter ones end before their queues have built up."""
MIN_REQUESTS, MAX_REQUESTS = 1000, 8000
STEP = 1.25
"""From one rate to the next while the goodput is looked for."""
BELOW = (0.4, 0.7)
"""Shares of the goodput at which the curve goes on below it."""


@dataclass(frozen=True)
class Point:
    """All requests of one run at one rate: (ttft, tpot, prompt tokens) each."""

    rate: float
    requests: tuple[tuple[float, float, int], ...]

    def attainment(self, targets: Targets) -> float:
        met = sum(f <= targets.ttft and g <= targets.tpot for f, g, _ in self.requests)
        return met / len(self.requests)

    def percentiles(self) -> tuple[Percentiles, Percentiles]:
        """Of TTFT and of TPOT."""
        firsts, gaps, _ = zip(*self.requests, strict=True)
        return Percentiles.of(firsts), Percentiles.of(gaps)


@dataclass(frozen=True)
class Verdict:
    """What one option does with the traffic.

    Attributes:
        goodput: highest rate, requests/s, with the goal's share; `goodput99` with 99 %.
        attainment: at the trace's own rate.
        prefill_busy: share of an aggregated worker's time that prompts take, to split its cost.
        curve: by rate; empty where there is no goodput.
    """

    option: Option
    goodput: float
    goodput99: float
    attainment: float
    ttft: Percentiles
    tpot: Percentiles
    prefill_busy: float
    curve: tuple[Point, ...]


def evaluate(question: Question, option: Option) -> Verdict:
    """Simulates the option on the trace's requests, at their own rate and stretched."""
    targets, share = question.goal.targets, question.goal.share
    near = guess(question, option)
    own = run_at(question, option, mean_rate(question.arrivals), near)
    points = {near: run_at(question, option, near, near)}
    up = points[near].attainment(targets) >= share
    rate = near
    while (points[rate].attainment(targets) >= share) == up and near / 256 < rate < near * 256:
        rate = rate * STEP if up else rate / STEP
        points[rate] = run_at(question, option, rate, near)
    best = goodput_on(_sorted(points), question.goal)
    if best > 0:
        middle = rate / STEP**0.5 if up else rate * STEP**0.5
        for extra in (middle, *(best * share for share in BELOW)):
            points[extra] = run_at(question, option, extra, near)
        best = goodput_on(_sorted(points), question.goal)
    curve = _sorted(points)
    return Verdict(
        option,
        best,
        goodput_on(curve, Goal(targets, 0.99)),
        own.attainment(targets),
        *own.percentiles(),
        prefill_share(question),
        curve,
    )


def _sorted(points: dict[float, Point]) -> tuple[Point, ...]:
    return tuple(points[rate] for rate in sorted(points))


def requests_for(question: Question, rate: float) -> tuple[Arrival, ...]:
    """As many requests of the trace as a run at `rate` needs.

    However many they are, their lengths are spread over the same stretch of the trace, so that
    options are compared under the same mix; their gaps are consecutive ones, which keeps bursts.
    Requests that share prefixes are consecutive themselves: only so do they share them.
    """
    wanted = min(MAX_REQUESTS, max(MIN_REQUESTS, math.ceil(rate * RUN_SECONDS)))
    stretch = window(question.arrivals, MAX_REQUESTS)
    gaps = window(stretch, wanted)
    if len(stretch) <= wanted or any(each.blocks for each in gaps):
        return gaps
    picked = (stretch[i * len(stretch) // wanted] for i in range(wanted))
    return tuple(replace(each, at=gap.at) for each, gap in zip(picked, gaps, strict=True))


def run_at(question: Question, option: Option, rate: float, near: float) -> Point:
    """The option at `rate`, on the requests that a rate of `near` needs."""
    requests = at_rate(requests_for(question, near), rate)
    outcomes = World(question.deployment(option), question.seed).run(requests)
    return Point(rate, tuple(_measures(outcome) for outcome in outcomes))


def _measures(outcome: Outcome) -> tuple[float, float, int]:
    return outcome.ttft, outcome.tpot, outcome.prompt


def goodput_on(curve: Sequence[Point], goal: Goal) -> float:
    """The goodput for other targets or another share, between the curve's points.

    Between two of them attainment is taken to fall evenly; outside them nothing is claimed.
    """
    best = 0.0
    for before, after in pairwise(curve):
        high, low = before.attainment(goal.targets), after.attainment(goal.targets)
        if high >= goal.share > low:
            share = (high - goal.share) / (high - low)
            best = max(best, before.rate + share * (after.rate - before.rate))
        elif low >= goal.share:
            best = max(best, after.rate)
    return best


def guess(question: Question, option: Option) -> float:
    """A rate near the option's goodput, from the work alone. Saves runs, decides nothing."""
    requests = requests_for(question, 0.0)
    performance, targets = question.performance, question.goal.targets
    prefill = sum(performance.prefill_seconds(a.prompt) for a in requests) / len(requests)
    output = sum(a.output for a in requests) / len(requests)
    context = sum(a.prompt + a.output / 2 for a in requests) / len(requests)
    batch = max(1, int(performance.kv_capacity / (context + output / 2)))
    batch = min(batch, question.limits.max_sequences)
    while batch > 1 and performance.decode_seconds(batch, batch * context) > targets.tpot:
        batch = batch * 9 // 10
    decode = output * performance.decode_seconds(batch, batch * context) / batch
    if option.both:
        rate = option.both / (prefill + decode)
    else:
        rate = min(option.prefill / prefill, option.decode / decode)
    return max(0.7 * rate, mean_rate(requests) / 64)


def prefill_share(question: Question) -> float:
    """Of the work of all requests, what prompts take, decodes in batches of 32."""
    requests = requests_for(question, 0.0)
    performance = question.performance
    prefill = sum(performance.prefill_seconds(a.prompt) for a in requests)
    decode = sum(
        a.output * performance.decode_seconds(32, 32 * (a.prompt + a.output / 2)) / 32
        for a in requests
    )
    return prefill / (prefill + decode)


def mixed(requests: Sequence[Arrival], prompts: float, outputs: float, limit: int) -> list[Arrival]:
    """The same requests with longer or shorter prompts and outputs, within the model's length."""
    result = []
    for each in requests:
        output = min(max(1, math.ceil(each.output * outputs)), limit - 1)
        prompt = min(max(1, math.ceil(each.prompt * prompts)), limit - output)
        result.append(replace(each, prompt=prompt, output=output))
    return result
