"""Goodput: the highest rate at which a deployment still meets the targets often enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Outcome, Targets
from cluster.simulator.workload import Arrival, at_rate, mean_rate
from cluster.simulator.world import World


class _Hopeless(Exception):
    """So many requests have missed that the rest cannot mend it."""


@dataclass(frozen=True)
class Goal:
    """What counts as meeting the targets: a share of all offered requests, such as 0.9."""

    targets: Targets
    share: float = 0.9


def holds(deployment: Deployment, arrivals: Sequence[Arrival], goal: Goal, seed: int = 0) -> bool:
    """Whether the deployment meets the goal on this workload; stops as soon as it cannot."""
    return play(deployment, arrivals, goal, seed)[0]


def play(
    deployment: Deployment, arrivals: Sequence[Arrival], goal: Goal, seed: int = 0
) -> tuple[bool, list[Outcome]]:
    """As `holds`, and all outcomes, or those there were when the goal got out of reach."""
    world = World(deployment, seed)
    allowed = int((1 - goal.share) * len(arrivals) + 1e-9)
    misses = 0
    ended: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        nonlocal misses
        ended.append(outcome)
        misses += not outcome.meets(goal.targets)
        if misses > allowed:
            raise _Hopeless

    world.on_end = note
    try:
        return True, world.run(arrivals)
    except _Hopeless:
        return False, ended


def goodput(
    deployment: Deployment,
    arrivals: Sequence[Arrival],
    goal: Goal,
    seed: int = 0,
    near: float | None = None,
    precision: float = 0.03,
) -> float:
    """The highest rate, requests/s, at which the goal holds; 0 if it holds at none.

    The workload keeps its requests and the shape of its arrivals; time is stretched.

    Args:
        near: a guess, such as a neighbour's goodput; it only saves time.
        precision: relative, of the result.
    """
    low, high = 0.0, 0.0
    rate = near or mean_rate(arrivals)
    least = rate / 512
    while not high or not low:
        if holds(deployment, at_rate(arrivals, rate), goal, seed):
            low = rate
            rate *= 1.25 if near else 2.0
            if rate > least * 512 * 4096:
                return low  # The targets ask for nothing that load could spoil.
        else:
            high = rate
            rate /= 1.25 if near else 2.0
            if rate < least:
                return 0.0
    while high > low * (1 + precision):
        rate = (low * high) ** 0.5
        if holds(deployment, at_rate(arrivals, rate), goal, seed):
            low = rate
        else:
            high = rate
    return low
