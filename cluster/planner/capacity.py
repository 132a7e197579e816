"""Predicts attainment: what share of the requests a number of workers serves within its targets.

Distributions and queues, not averages. Prompts wait in a G/G/c queue with the sample's own service
times. Decodes are an M/G/∞ population, spread evenly: a worker's batch decides its step time, and
the population's fluctuation how often that is too long. On aggregated workers prompts' chunks
stretch the steps of the decodes beside them. Workers on one host's cores slow each other, in
balance; engines that plan ahead tell a short prompt's token late when the next one has come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from cluster.planner.demand import Demand, Lengths
from cluster.planner.performance import Performance
from cluster.planner.queueing import Wait, poisson_at_most, wait_mgc
from cluster.planner.sharing import ALONE, NOTHING, Beside, in_balance, slowed
from cluster.planner.state import ClassTargets, Counts

IMBALANCE = 1.15
"""Placement is not one shared queue: it cannot move what it has placed. By so much longer is the
wait than in one, as the simulator has it."""


@dataclass(frozen=True)
class Attainment:
    """Shares of one class's requests that meet each target, and both."""

    ttft: float
    tpot: float

    @property
    def both(self) -> float:
        return self.ttft * self.tpot


@dataclass(frozen=True)
class Load:
    """A demand of several classes, as the pools feel it.

    Attributes:
        chunk: tokens per engine step.
        max_sequences: per engine step.
    """

    performance: Performance
    demands: Mapping[str, Demand]
    targets: Mapping[str, ClassTargets]
    chunk: int = 2048
    max_sequences: int = 256

    @cached_property
    def rate(self) -> float:
        return sum(d.rate for d in self.demands.values())

    @cached_property
    def _requests(self) -> tuple[tuple[float, Lengths], ...]:
        """Every sampled request with its rate."""
        return tuple(
            (d.rate / len(d.lengths), each)
            for d in self.demands.values()
            if d.rate > 0
            for each in d.lengths
        )

    @cached_property
    def prefill_work(self) -> float:
        """Seconds of prefill that arrive per second: the least number of prefill workers."""
        return sum(rate * self._prefill(each) for rate, each in self._requests)

    @cached_property
    def _prefill_scv(self) -> float:
        if not self.prefill_work:
            return 0.0
        mean = self.prefill_work / self.rate
        second = sum(rate * self._prefill(each) ** 2 for rate, each in self._requests) / self.rate
        return max(0.0, second / mean**2 - 1)

    @cached_property
    def _burstiness(self) -> float:
        if not self.rate:
            return 1.0
        return sum(d.rate * d.burstiness for d in self.demands.values()) / self.rate

    @cached_property
    def output_rate(self) -> float:
        """Tokens/s that decodes are to make."""
        return sum(rate * (each.output - 1) for rate, each in self._requests)

    @cached_property
    def context(self) -> float:
        """Mean tokens that a decoding sequence holds."""
        if not self.output_rate:
            return 0.0
        held = sum(
            rate * (each.output - 1) * (each.prompt + each.output / 2)
            for rate, each in self._requests
        )
        return held / self.output_rate

    def split(self, prefill: int, decode: int) -> dict[str, Attainment]:
        """By class, on so many prefill and decode workers."""
        if self.shares_cores:
            return self._sharing(Counts(prefill, decode)).split(prefill, decode)
        wait, late = self._wait(prefill, 0.0), self.rate / max(1, prefill)
        population = self._population(decode)
        return {
            kind: Attainment(
                self._ttft_met(demand, self.targets[kind], wait, 0.0, late),
                self._tpot_met(demand, self.targets[kind], decode, population),
            )
            for kind, demand in self.demands.items()
            if demand.rate > 0
        }

    def whole(self, workers: int) -> dict[str, Attainment]:
        """By class, on so many aggregated workers."""
        if self.performance.whole is not None:
            return replace(self, performance=self.performance.whole).whole(workers)
        if self.shares_cores:
            return self._sharing(Counts(both=workers)).whole(workers)
        busy = self.prefill_work / workers if workers else math.inf
        batch, step = self._balance(workers, 1 - busy)
        if busy >= 1 or math.isinf(batch):
            return {k: Attainment(0.0, 0.0) for k, d in self.demands.items() if d.rate > 0}
        stretch = step - self.performance.decode_cost(max(1, int(batch))).base if batch else 0.0
        wait = self._wait(workers, stretch)
        late = self.rate / workers * math.exp(-batch)  # beside decodes nothing is planned ahead
        return {
            kind: Attainment(
                self._ttft_met(demand, self.targets[kind], wait, stretch + step / 2, late),
                self._mixed_tpot_met(demand, self.targets[kind], workers, batch, step),
            )
            for kind, demand in self.demands.items()
            if demand.rate > 0
        }

    # --- workers on the same cores --------------------------------------------------------------

    @property
    def shares_cores(self) -> bool:
        """Its workers are on one host, and slow each other."""
        return self.performance.contention != ALONE

    def beside(self, counts: Counts) -> Beside:
        """What these workers have beside them, on average; nothing where each has its own cores."""
        if not self.shares_cores:
            return NOTHING

        def at(worker: Performance) -> Beside:
            load = replace(self, performance=worker)
            if counts.both:
                return load._beside_whole(counts.both)
            return load._beside_split(counts.prefill, counts.decode)

        return in_balance(self.performance, at)

    def _sharing(self, counts: Counts) -> Load:
        """The same demand on workers as slow as they make each other."""
        return replace(self, performance=slowed(self.performance, self.beside(counts)))

    def _beside_split(self, prefill: int, decode: int) -> Beside:
        prompts = min(1.0, self.prefill_work / max(1, prefill))
        decodes = 1 - math.exp(-self._population(decode) / max(1, decode))
        handoffs = sum(rate for rate, each in self._requests if each.output > 1) / max(1, decode)
        return Beside(
            (prefill - 1) * prompts + decode * decodes,
            prefill * prompts + (decode - 1) * decodes,
            handoffs,
        )

    def _beside_whole(self, workers: int) -> Beside:
        prompts = min(1.0, self.prefill_work / max(1, workers))
        batch, _ = self._balance(workers, 1 - prompts)
        others = (workers - 1) * (1 - (1 - prompts) * math.exp(-batch))
        return Beside(others, others)

    # --- prompts --------------------------------------------------------------------------------

    def _prefill(self, each: Lengths) -> float:
        return self.performance.prefill_seconds(each.new, each.cached)

    def _wait(self, workers: int, stretch: float) -> Wait:
        if not self.rate:
            return Wait(0.0, 0.0)
        mean = self.prefill_work / self.rate + stretch
        wait = wait_mgc(self.rate, workers, mean, self._prefill_scv, self._burstiness)
        return Wait(wait.probability, wait.mean * IMBALANCE)

    def _ttft_met(
        self, demand: Demand, targets: ClassTargets, wait: Wait, extra: float, late: float
    ) -> float:
        """`late`: prompts/s that come to a worker whose engine, if it plans ahead, starts another
        step before it tells the token of this one."""
        met, extra = 0.0, extra + self.performance.dispatch
        for each in demand.lengths:
            left = targets.ttft - self._prefill(each) - extra
            in_time = 1 - wait.longer_than(left)
            if self.performance.launch:
                launch = self.performance.launch.seconds(each.new)
                share = 1 - math.exp(-late * launch)
                told = launch + self.performance.launch.seconds(each.new, behind=True)
                longer = max(0.0, told - self._prefill(each))
                in_time = (1 - share) * in_time + share * (1 - wait.longer_than(left - longer))
            met += in_time
        return met / len(demand.lengths)

    # --- decodes --------------------------------------------------------------------------------

    def _slope(self, batch: float) -> tuple[float, float]:
        """A step's seconds at about this batch: (base, per sequence)."""
        cost = self.performance.decode_cost(max(1, int(batch)))
        return cost.base, cost.per_sequence + cost.per_context * self.context

    def _balance(self, workers: int, share: float) -> tuple[float, float]:
        """The mean batch of a worker that decodes for a share of its time, and its step.

        In balance batch = output rate × step ÷ (workers × share); infinite where no batch is.
        """
        if not self.output_rate:
            return 0.0, 0.0
        if not workers or share <= 0:
            return math.inf, math.inf
        each = self.output_rate / (workers * share)
        for large in (False, True):
            start = self.performance.large_batch if large else 1
            base, slope = self._slope(start)
            if each * slope >= 1:
                continue
            batch = each * base / (1 - each * slope)
            if large or batch < self.performance.large_batch:
                return batch, base + slope * batch
        return math.inf, math.inf

    def _population(self, workers: int) -> float:
        """Mean number of sequences that decode, on all workers."""
        batch, _ = self._balance(workers, 1.0)
        return batch * workers

    def _room(self) -> float:
        """Sequences that a worker's KV cache and step hold."""
        held = self.context + self.output_rate / max(self.rate, 1e-9) / 2
        room = self.performance.kv_capacity / held if held else math.inf
        return min(room, self.max_sequences)

    def _largest_batch(self, step: float) -> float:
        """The largest batch whose step stays within so many seconds; −1 if none does."""
        limit = -1.0
        for at in (1.0, float(self.performance.large_batch)):
            base, slope = self._slope(at)
            batch = (step - base) / slope if slope > 0 else math.inf
            if at == 1.0:
                batch = min(batch, self.performance.large_batch - 1)
            if batch >= at:
                limit = batch
        return min(limit, self._room())

    def _tpot_met(
        self, demand: Demand, targets: ClassTargets, workers: int, population: float
    ) -> float:
        """The handoff counts: short answers feel it most."""
        met = 0.0
        for each in demand.lengths:
            if each.output == 1:
                met += 1
                continue
            hidden = self._prefill(each)
            exposed = self.performance.exposed_handoff_seconds(each.prompt, hidden)
            step = targets.tpot - exposed / (each.output - 1)
            met += poisson_at_most(population, workers * self._largest_batch(step))
        return met / len(demand.lengths)

    def _mixed_tpot_met(
        self,
        demand: Demand,
        targets: ClassTargets,
        workers: int,
        batch: float,
        step: float,
    ) -> float:
        """How many prompt chunks fall into a decode's life is a Poisson number."""
        fits = poisson_at_most(batch * workers, workers * self._room())
        chunks = sum(rate * math.ceil(each.new / self.chunk) for rate, each in self._requests)
        seconds = self.prefill_work / chunks if chunks else 0.0
        met = 0.0
        for each in demand.lengths:
            if each.output == 1:
                met += 1
                continue
            steps = each.output - 1
            life = steps * step / (1 - self.prefill_work / workers)
            slack = (targets.tpot - step) * steps
            if seconds > 0:
                met += poisson_at_most(chunks / workers * life, slack / seconds)
            else:
                met += slack >= 0
        return met / len(demand.lengths) * fits
