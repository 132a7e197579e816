"""What arrives: requests with their times, sizes and prefixes; from traces or drawn from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Arrival:
    """One request of a workload.

    Attributes:
        at: seconds since the workload's start.
        prompt, output: tokens; output is what the engine will generate, at least 1.
        blocks: hashes of the prompt's whole blocks, each standing for all before it too.
        block_tokens: per block.
        kind: the class whose targets it has.
    """

    at: float
    prompt: int
    output: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 512
    kind: str = ""


def poisson(
    rate: float, seconds: float, lengths: Callable[[random.Random], tuple[int, int]], seed: int
) -> list[Arrival]:
    """Poisson arrivals at `rate` for `seconds`, with (prompt, output) drawn by `lengths`."""
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    at = rng.expovariate(rate)
    while at < seconds:
        prompt, output = lengths(rng)
        arrivals.append(Arrival(at, prompt, output))
        at += rng.expovariate(rate)
    return arrivals


def lognormal(mean: float, median: float, low: int, high: int) -> Callable[[random.Random], int]:
    """Draws token counts with about this mean and median, within [low, high]."""
    mu = math.log(median)
    sigma = math.sqrt(max(0.0, 2 * math.log(mean / median)))

    def draw(rng: random.Random) -> int:
        return min(high, max(low, round(rng.lognormvariate(mu, sigma))))

    return draw


def at_rate(arrivals: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests in the same order, time stretched so that the mean rate is `rate`."""
    factor = mean_rate(arrivals) / rate
    return [replace(each, at=each.at * factor) for each in arrivals]


def repeated(arrivals: Sequence[Arrival], least: int) -> tuple[Arrival, ...]:
    """At least `least` requests: the same ones again and again, at their rate. Each repetition has
    prefixes of its own, so that no cache knows it from the one before."""
    if len(arrivals) < 2:
        return tuple(arrivals)
    times = max(1, math.ceil(least / len(arrivals)))
    every = (arrivals[-1].at - arrivals[0].at) * len(arrivals) / (len(arrivals) - 1)
    again = (
        replace(each, at=each.at + k * every, blocks=tuple(hash((k, b)) for b in each.blocks))
        for k in range(1, times)
        for each in arrivals
    )
    return (*arrivals, *again)


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests/s from the first to the last arrival."""
    span = arrivals[-1].at - arrivals[0].at if arrivals else 0.0
    return (len(arrivals) - 1) / span if span > 0 else math.inf


def merged(*workloads: Iterable[Arrival]) -> list[Arrival]:
    """Several workloads at once."""
    return sorted((a for w in workloads for a in w), key=lambda each: each.at)
