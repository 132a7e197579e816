"""How many workers a load needs: the fewest that meet every class's targets, split or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from cluster.planner.capacity import Attainment, Load
from cluster.planner.state import Counts, Shortfall

ENDLESS = 10**6
"""Workers: more than any load waits for."""
ROOM = 0.4
"""The part of what a goal lets miss that must be left for waiting; beside it, prompts too long for
any worker may be missed."""

TRIED = 45
"""Of the workers that share a host, so many splits at most: all of up to ten workers."""
CLEARLY = 0.005
"""A share that is worth more workers where none are enough."""


@dataclass(frozen=True)
class Sizing:
    """An answer for one mode.

    Attributes:
        counts: all of the budget, where that is too little and more would serve more.
        predicted: by class, with these counts.
        enough: every class meets its targets.
    """

    counts: Counts
    predicted: Mapping[str, Attainment]
    enough: bool

    @property
    def worst(self) -> float:
        """The smallest attainment of a class."""
        return min((each.both for each in self.predicted.values()), default=1.0)


def size_split(load: Load, most: int, minimum: int = 1) -> Sizing | None:
    """The fewest prefill and decode workers; None if the budget has no room for both pools.

    Each pool is to meet √share, so that both together meet the share; then either gives back what
    the other's surplus allows. Where the budget is too small it is used where it helps the worst
    class most; where no number is enough, as many are taken as serve a share of those they can.
    """
    if most < 2 * minimum:
        return None
    if load.shares_cores:
        return _fitting(load, _splits(minimum, most))
    goals = _goals(load, load.split(ENDLESS, ENDLESS))
    both = {kind: each.both for kind, each in goals.items()}

    def ttft_met(prefill: int) -> bool:
        met = load.split(prefill, most)
        return all(a.ttft >= goals[k].ttft for k, a in met.items())

    def tpot_met(decode: int) -> bool:
        met = load.split(most, decode)
        return all(a.tpot >= goals[k].tpot for k, a in met.items())

    prefill = _fewest(ttft_met, minimum, most - minimum)
    decode = _fewest(tpot_met, minimum, most - minimum)
    if prefill is None or decode is None or prefill + decode > most:
        return _best_split(load, most, minimum)
    for fewer_prefill, fewer_decode in ((1, 0), (0, 1)):
        p, d = prefill - fewer_prefill, decode - fewer_decode
        if min(p, d) >= minimum and _reaches(both, load.split(p, d)):
            prefill, decode = p, d
    return _sizing(load, Counts(prefill=prefill, decode=decode), load.split(prefill, decode))


def size_whole(load: Load, most: int, minimum: int = 1) -> Sizing:
    """The fewest aggregated workers, or all that the budget has."""
    if load.shares_cores:
        return _fitting(load, (Counts(both=n) for n in range(minimum, most + 1)))
    goals = {
        kind: _within(load.targets[kind].share, each.both, load.targets[kind].share)
        for kind, each in load.whole(ENDLESS).items()
    }
    fewest = _fewest(lambda workers: _reaches(goals, load.whole(workers)), minimum, most)
    workers = most if fewest is None else fewest
    return _sizing(load, Counts(both=workers), load.whole(workers))


def _fitting(load: Load, tried: Iterable[Counts]) -> Sizing:
    """The first of these, fewest workers first, with which every class meets its targets; else the
    one that serves the worst class best. On shared cores each worker slows the others, so that more
    may serve less, and all are tried."""
    best: Sizing | None = None
    for counts in islice(tried, TRIED):
        predicted = (
            load.whole(counts.both) if counts.both else load.split(counts.prefill, counts.decode)
        )
        sizing = _sizing(load, counts, predicted)
        if sizing.enough:
            return sizing
        if best is None or sizing.worst > best.worst + CLEARLY:
            best = sizing
    assert best is not None, "a budget has room for one worker of each role in use"
    return best


def _splits(minimum: int, most: int) -> Iterator[Counts]:
    """All that a budget has room for, fewest workers first."""
    for total in range(2 * minimum, most + 1):
        for prefill in range(minimum, total - minimum + 1):
            yield Counts(prefill=prefill, decode=total - prefill)


def _best_split(load: Load, most: int, minimum: int) -> Sizing:
    """The whole budget, split so that the worst class is served best.

    Attainment rises and then falls along the ratio, but is flat where nothing is met: there the
    work decides, so that what admission lets in passes both pools. At most 65 splits are tried, so
    that a thousand workers cost no more than that.
    """
    work = load.prefill_work + _decode_work(load)
    share = load.prefill_work / work if work else 0.5
    near = min(max(minimum, round(share * most)), most - minimum)
    span = max(1, most // 64)
    candidates = {near, *range(minimum, most - minimum + 1, span)}

    def value(prefill: int) -> tuple[float, int]:
        met = load.split(prefill, most - prefill)
        worst = min((a.both for a in met.values()), default=1.0)
        return round(worst, 3), -abs(prefill - near)

    prefill = max(sorted(candidates), key=value)
    counts = Counts(prefill=prefill, decode=most - prefill)
    return _sizing(load, counts, load.split(counts.prefill, counts.decode))


def _decode_work(load: Load) -> float:
    """Workers that decode at a batch that meets the tightest TPOT."""
    if not load.output_rate:
        return 0.0
    worker = load.performance
    batch = 1
    tightest = min(t.tpot for k, t in load.targets.items() if k in load.demands)
    while batch < load.max_sequences:
        if worker.decode_seconds(batch * 2, batch * 2 * load.context) > tightest:
            break
        batch *= 2
    return load.output_rate * worker.decode_seconds(batch, batch * load.context) / batch


def _fewest(enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """The least number that is enough, if `high` is."""
    if high < low or not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _goals(load: Load, endless: Mapping[str, Attainment]) -> dict[str, Attainment]:
    """By class, what two pools are sized for: √share each; where no number of workers reaches that,
    √share of those whom it can serve, and the other pool makes up for it as far as it can."""
    goals = {}
    for kind, most in endless.items():
        share = load.targets[kind].share
        each = math.sqrt(share)
        ttft, tpot = _within(each, most.ttft, each), _within(each, most.tpot, each)
        if ttft < each:
            tpot = _within(share / ttft, most.tpot, each)
        elif tpot < each:
            ttft = _within(share / tpot, most.ttft, each)
        goals[kind] = Attainment(ttft, tpot)
    return goals


def _within(goal: float, most: float, share: float) -> float:
    """The goal, or where the `most` that can be leaves it no room, a share of that: else all the
    budget would go for what it cannot reach. If nothing can be reached it stays the goal."""
    return goal if not most or goal <= most - ROOM * (1 - goal) else share * most


def _reaches(goals: Mapping[str, float], predicted: Mapping[str, Attainment]) -> bool:
    return all(each.both >= goals[kind] for kind, each in predicted.items())


def _meets(load: Load, predicted: Mapping[str, Attainment]) -> bool:
    return all(each.both >= load.targets[kind].share for kind, each in predicted.items())


def _sizing(load: Load, counts: Counts, predicted: Mapping[str, Attainment]) -> Sizing:
    return Sizing(counts, predicted, _meets(load, predicted))


def shortfalls(load: Load, sizing: Sizing) -> tuple[Shortfall, ...]:
    """Which targets these counts miss, and by how much at the share's percentile."""
    found = []
    for kind, predicted in sizing.predicted.items():
        targets = load.targets[kind]
        if predicted.both >= targets.share:
            continue
        metric = "ttft" if predicted.ttft <= predicted.tpot else "tpot"
        target = targets.ttft if metric == "ttft" else targets.tpot
        reached = _reached(load, sizing.counts, kind, metric)
        found.append(
            Shortfall(
                kind,
                "ttft" if metric == "ttft" else "tpot",
                target,
                predicted.both,
                reached - target,
            )
        )
    return tuple(found)


def _reached(load: Load, counts: Counts, kind: str, metric: str) -> float:
    """The target that these counts would meet, by doubling and bisection; infinity beyond ×1000."""
    start = load.targets[kind]

    def met(factor: float) -> bool:
        eased = type(start)(
            start.ttft * (factor if metric == "ttft" else 1e6),
            start.tpot * (factor if metric == "tpot" else 1e6),
            start.share,
        )
        other = Load(
            load.performance,
            load.demands,
            {**load.targets, kind: eased},
            load.chunk,
            load.max_sequences,
        )
        if counts.both:
            predicted = other.whole(counts.both)
        else:
            predicted = other.split(counts.prefill, counts.decode)
        each = predicted[kind]
        return (each.ttft if metric == "ttft" else each.tpot) >= start.share

    if not met(1000.0):
        return math.inf
    low, high = 1.0, 1000.0
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if met(middle) else (middle, high)
    return high * (start.ttft if metric == "ttft" else start.tpot)


def better(one: Sizing, than: Sizing, gain: float) -> bool:
    """Fewer workers by more than `gain`, if both are enough; else what serves the worst better."""
    if one.enough and than.enough:
        return one.counts.total < than.counts.total * (1 - gain)
    if one.enough != than.enough:
        return one.enough
    return one.worst > than.worst + max(gain, 0.02)
