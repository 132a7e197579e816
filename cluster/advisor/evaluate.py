"""One option's answer: its goodput, and how attainment falls with the rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cluster.advisor.question import Option, Question, window
from cluster.simulator.goodput import Goal, play
from cluster.simulator.outcome import Outcome, Percentiles, Targets
from cluster.simulator.workload import Arrival, at_rate, mean_rate, repeated
from cluster.simulator.world import World

RUN_SECONDS = 15.0
"""A run lasts so long, about: shorter ones end before their queues have built up."""
MIN_REQUESTS, MAX_REQUESTS = 1000, 8000
STEP = 1.25
"""From one rate to the next while the goodput is looked for."""
REACH = 32.0
"""It is looked for up to so many times the guess; targets that no load spoils have it there."""
BELOW = (0.4, 0.7)
"""Shares of the goodput at which the curve goes on below it."""


@dataclass(frozen=True)
class Point:
    """The requests of one run at one rate: (ttft, tpot, prompt tokens) each.

    Attributes:
        whole: all of them; else those that had ended when the run was broken off.
    """

    rate: float
    requests: tuple[tuple[float, float, int], ...]
    whole: bool = True

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
        goodput: highest rate, requests/s, with the goal's share; `goodput99` with 99 %, 0 if no run
            had that.
        attainment: at the trace's own rate.
        prefill_busy: share of an aggregated worker's time that prompts take, to split its cost.
        curve: by rate; empty where there is no goodput.
        rough: by runs that were broken off as soon as they missed the goal.
    """

    option: Option
    goodput: float
    goodput99: float
    attainment: float
    ttft: Percentiles
    tpot: Percentiles
    prefill_busy: float
    curve: tuple[Point, ...]
    rough: bool = False


def roughly(question: Question, options: Sequence[Option]) -> list[Verdict]:
    """The options one after another; how far off the guess was for one mends that for the next.

    Each goodput lies between two rates that are a step apart. The run above is broken off as soon
    as it misses the goal.
    """
    requests, verdicts = requests_for(question), list[Verdict]()
    off = 1.0
    for option in options:
        guessed = guess(question, option)
        points = _bracket(question, option, requests, guessed, guessed * off)
        verdicts.append(_verdict(question, option, points))
        off = min(verdicts[-1].goodput / guessed or off, REACH / 4)
    return verdicts


def _bracket(
    question: Question, option: Option, requests: Sequence[Arrival], guessed: float, near: float
) -> dict[float, Point]:
    low, high, rate, step = 0.0, math.inf, near, STEP
    points: dict[float, Point] = {}
    while guessed / 256 < rate < guessed * REACH and high > low * STEP * 1.001:
        met, points[rate] = _try_at(question, option, requests, rate)
        low, high = (rate, high) if met else (low, rate)
        if low and high < math.inf:
            rate = (low * high) ** 0.5
        else:
            rate = rate * step if met else rate / step
            step = min(step * STEP, 2.0)
    return points


def evaluate(question: Question, found: Verdict) -> Verdict:
    """Goes on from what was found roughly, on the same requests, with no run broken off."""
    requests = requests_for(question)
    goal, option = question.goal, found.option
    points = {p.rate: p for p in found.curve if p.whole}
    low, high = around(found, goal)
    more = [high] if high < math.inf else []
    if low and more:
        more.append((low * high) ** 0.5)
    more += [found.goodput * share for share in BELOW if found.goodput]
    for rate in more:
        points[rate] = run_at(question, option, requests, rate)
    curve = _by_rate(points)
    best, strict = _goodputs(curve, goal)
    return replace(found, goodput=best, goodput99=strict, curve=curve, rough=False)


def around(verdict: Verdict, goal: Goal) -> tuple[float, float]:
    """The highest rate that met the goal, 0 if none did, and the lowest above it that did not."""
    targets = goal.targets
    met = [p.rate for p in verdict.curve if p.attainment(targets) >= goal.share]
    low = max(met, default=0.0)
    return low, min((p.rate for p in verdict.curve if p.rate > low), default=math.inf)


def keeps_up(question: Question, option: Option, rate: float) -> bool:
    """Whether the option meets the goal at `rate`."""
    return _try_at(question, option, requests_for(question), rate)[0]


def _verdict(question: Question, option: Option, points: dict[float, Point]) -> Verdict:
    curve, goal = _by_rate(points), question.goal
    own = requests_for(question, least=True)
    now = run_at(question, option, own, mean_rate(question.arrivals))
    first, gap = now.percentiles()
    best, strict = _goodputs(curve, goal)
    return Verdict(
        option,
        best,
        strict,
        attainment=now.attainment(goal.targets),
        ttft=first,
        tpot=gap,
        prefill_busy=prefill_share(question),
        curve=curve,
        rough=True,
    )


def _by_rate(points: dict[float, Point]) -> tuple[Point, ...]:
    return tuple(points[rate] for rate in sorted(points))


def _goodputs(curve: Sequence[Point], goal: Goal) -> tuple[float, float]:
    """With the goal's share, and with 99 %."""
    return goodput_on(curve, goal), goodput_on(curve, Goal(goal.targets, 0.99))


def requests_for(question: Question, least: bool = False) -> tuple[Arrival, ...]:
    """The requests of every run: as many of the trace as the workers can take in RUN_SECONDS.

    However many they are, their lengths are spread over the same stretch of the trace; their gaps
    are consecutive ones, which keeps bursts. Requests that share prefixes are consecutive
    themselves: only so do they share them. A trace of fewer is repeated: all of it would
    be there before a queue could build up, and meet its targets at any rate.

    Args:
        least: as few as there may be.
    """
    wanted = MIN_REQUESTS
    if not least:
        rate = guess(question, Option(both=question.gpus // question.performance.gpus))
        wanted = min(MAX_REQUESTS, max(wanted, math.ceil(rate * RUN_SECONDS)))
    stretch = window(repeated(question.arrivals, wanted), MAX_REQUESTS)
    gaps = window(stretch, wanted)
    if len(stretch) <= wanted or any(each.blocks for each in gaps):
        return gaps
    picked = (stretch[i * len(stretch) // wanted] for i in range(wanted))
    return tuple(replace(each, at=gap.at) for each, gap in zip(picked, gaps, strict=True))


def run_at(question: Question, option: Option, requests: Sequence[Arrival], rate: float) -> Point:
    """The option on these requests, at `rate`."""
    outcomes = World(question.deployment(option), question.seed).run(at_rate(requests, rate))
    return _point(rate, outcomes)


def _try_at(
    question: Question, option: Option, requests: Sequence[Arrival], rate: float
) -> tuple[bool, Point]:
    """The same, broken off when it misses the goal; and whether it does not."""
    arrivals, deployment = at_rate(requests, rate), question.deployment(option)
    met, outcomes = play(deployment, arrivals, question.goal, question.seed)
    return met, _point(rate, outcomes, met)


def _point(rate: float, outcomes: Sequence[Outcome], whole: bool = True) -> Point:
    return Point(rate, tuple((each.ttft, each.tpot, each.prompt) for each in outcomes), whole)


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
    requests = requests_for(question, least=True)
    performance, targets = question.performance, question.goal.targets
    prefill = sum(performance.prefill_seconds(a.prompt) for a in requests) / len(requests)
    output = sum(a.output for a in requests) / len(requests)
    context = sum(a.prompt + a.output / 2 for a in requests) / len(requests)
    batch = max(1, int(performance.kv_capacity / (context + output / 2)))
    batch = min(batch, question.limits.max_sequences)
    while batch > 1 and performance.decode_seconds(batch, batch * context) > targets.tpot:
        batch = batch * 9 // 10
    decode = output * performance.decode_seconds(batch, batch * context) / batch
    rate = (option.prefill + option.decode + option.both) / (prefill + decode)
    if not option.both:
        # Placement runs some requests whole, so that roles bind less than they seem to.
        strict = min(option.prefill / prefill, option.decode / decode)
        rate = (rate * strict) ** 0.5
    return max(rate, mean_rate(requests) / 64)


def prefill_share(question: Question) -> float:
    """Of the work of all requests, what prompts take, decodes in batches of 32."""
    requests = requests_for(question, least=True)
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
