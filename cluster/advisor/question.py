"""What the advisor is asked, and what it is told when it asks for the impossible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.planner.calibrate import quantile
from cluster.planner.hardware import Hardware
from cluster.planner.performance import Performance
from cluster.planner.shape import ModelShape
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.goodput import Goal
from cluster.simulator.workload import Arrival, mean_rate


@dataclass(frozen=True)
class Option:
    """Workers by role: a split, or all of them aggregated."""

    prefill: int = 0
    decode: int = 0
    both: int = 0

    def __str__(self) -> str:
        return f"{self.both} aggregated" if self.both else f"{self.prefill}P:{self.decode}D"


@dataclass(frozen=True)
class Question:
    """Everything an answer depends on.

    Attributes:
        gpus: in all; a worker takes `performance.gpus` of them.
        dollars_per_hour: of one GPU.
        arrivals: the traffic, by time.
    """

    shape: ModelShape
    hardware: Hardware
    performance: Performance
    gpus: int
    goal: Goal
    arrivals: tuple[Arrival, ...]
    dollars_per_hour: float
    limits: EngineLimits
    seed: int = 0

    def options(self) -> list[Option]:
        """Every split of the workers, and all aggregated.

        Raises:
            InvalidRequest: there is no whole worker, or GPUs are left over.
        """
        each = self.performance.gpus
        workers, left = divmod(self.gpus, each)
        if workers < 1 or left:
            raise InvalidRequest(
                "gpus", f"{self.gpus} cannot be split into whole workers of {each} GPU(s) each"
            )
        splits = [Option(prefill=p, decode=workers - p) for p in range(1, workers)]
        return [Option(both=workers), *splits]

    def deployment(self, option: Option) -> Deployment:
        block_tokens = self.arrivals[0].block_tokens if self.arrivals else 512
        return Deployment(
            self.performance,
            option.prefill,
            option.decode,
            option.both,
            self.limits,
            block_tokens=block_tokens,
            ttft=min(60.0, self.goal.targets.ttft),
            tpot=min(10.0, self.goal.targets.tpot),
        )


@dataclass(frozen=True)
class Floor:
    """What requests take when they are alone: no number of GPUs makes them quicker.

    Attributes:
        ttft, tpot: seconds that the goal's share of the requests stays within.
        attainment: of the goal's targets.
    """

    ttft: float
    tpot: float
    attainment: float


def floor(performance: Performance, arrivals: Sequence[Arrival], goal: Goal) -> Floor:
    """The floor of this traffic on this worker."""
    firsts, gaps, met = [], [], 0
    for each in arrivals:
        first = performance.prefill_seconds(each.prompt)
        gap = performance.decode_seconds(1, each.prompt + each.output / 2) if each.output > 1 else 0
        firsts.append(first)
        gaps.append(gap)
        met += first <= goal.targets.ttft and gap <= goal.targets.tpot
    firsts.sort()
    gaps.sort()
    return Floor(
        quantile(firsts, goal.share), quantile(gaps, goal.share), met / max(1, len(arrivals))
    )


def check_reachable(performance: Performance, arrivals: Sequence[Arrival], goal: Goal) -> Floor:
    """The floor. Raises InvalidRequest that tells it if the targets are below it.

    A prefix cache may serve a prompt quicker than its floor; targets that only a cache can meet are
    refused all the same where the trace carries no hashes.
    """
    least = floor(performance, arrivals, goal)
    if least.attainment < goal.share and not any(each.blocks for each in arrivals):
        raise InvalidRequest(
            "slo",
            f"idle, one request at a time, {least.attainment:.0%} of this traffic meets "
            f"ttft={goal.targets.ttft:g},tpot={goal.targets.tpot:g}; the floor for "
            f"{goal.share:.0%} is ttft={least.ttft:.3g},tpot={least.tpot:.3g} "
            f"({performance.label})",
        )
    return least


def window(arrivals: Sequence[Arrival], size: int) -> tuple[Arrival, ...]:
    """`size` consecutive requests whose rate is nearest to the whole trace's."""
    if len(arrivals) <= size:
        return tuple(arrivals)
    wanted = mean_rate(arrivals)
    starts = range(0, len(arrivals) - size + 1, max(1, size // 8))
    best = min(
        starts,
        key=lambda start: abs(math.log(mean_rate(arrivals[start : start + size]) / wanted)),
    )
    return tuple(arrivals[best : best + size])
