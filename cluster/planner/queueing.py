"""Queueing formulas: how long work waits, on average and in the tail.

Rates in 1/s, times in s. A queue that is not stable waits for ever: the formulas return infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def md1_ttft(rate: float, service: float) -> float:
    """Mean time in an M/D/1 queue with service time D: D + R·D²/(2(1−R·D)) (DistServe §3)."""
    if rate * service >= 1:
        return math.inf
    return service + rate * service**2 / (2 * (1 - rate * service))


def md1_ttft_pipeline(rate: float, service: float) -> float:
    """The same over two pipeline stages: D + R·D²/(4(2−R·D))."""
    if rate * service >= 2:
        return math.inf
    return service + rate * service**2 / (4 * (2 - rate * service))


def md1_ttft_tensor(rate: float, service: float, speedup: float) -> float:
    """The same over two tensor-parallel GPUs: D/K + R·D²/(2K(K−R·D)), 1 < K ≤ 2."""
    if rate * service >= speedup:
        return math.inf
    return service / speedup + rate * service**2 / (2 * speedup * (speedup - rate * service))


def erlang_c(servers: int, load: float) -> float:
    """The share of arrivals that wait in M/M/c at `load` = rate × service; 1 when overloaded."""
    if load >= servers:
        return 1.0
    if load <= 0:
        return 0.0
    blocked = 1.0
    for k in range(1, servers + 1):  # Erlang B, by its stable recursion
        blocked = load * blocked / (k + load * blocked)
        if k > load and blocked < 1e-15:
            return 0.0
    return blocked / (1 - load / servers * (1 - blocked))


@dataclass(frozen=True)
class Wait:
    """The waiting time of a queue: a share does not wait, the rest waits exponentially long.

    Attributes:
        probability: of waiting at all.
        mean: over those who wait; infinite when the queue grows without end.
    """

    probability: float
    mean: float

    def longer_than(self, seconds: float) -> float:
        """P(W > seconds)."""
        if seconds < 0:
            return 1.0
        if math.isinf(self.mean):
            return 1.0
        if self.mean <= 0:
            return 0.0
        return self.probability * math.exp(-seconds / self.mean)

    def quantile(self, q: float) -> float:
        """The wait that a share q of the arrivals stays within."""
        if math.isinf(self.mean):
            return math.inf
        if 1 - q >= self.probability or self.mean <= 0:
            return 0.0
        return self.mean * math.log(self.probability / (1 - q))

    @property
    def overall_mean(self) -> float:
        """Over all arrivals."""
        return self.probability * self.mean


def wait_mgc(rate: float, servers: int, mean: float, scv: float, arrival_scv: float = 1.0) -> Wait:
    """G/G/c by Allen and Cunneen: M/M/c's wait × (ca² + cs²)/2; exact in the mean for M/G/1.

    Args:
        mean, scv: of the service time: mean, and variance over mean squared.
        arrival_scv: of the gaps between arrivals: 1 is Poisson, more is bursty.
    """
    if servers <= 0:
        return Wait(1.0, math.inf)
    load = rate * mean
    if load >= servers:
        return Wait(1.0, math.inf)
    if load <= 0:
        return Wait(0.0, 0.0)
    probability = erlang_c(servers, load)
    return Wait(probability, mean / (servers - load) * (arrival_scv + scv) / 2)


def poisson_at_most(mean: float, limit: float) -> float:
    """P(N ≤ limit) for a Poisson N: exact for small means, normal beyond 100; either may be
    infinite."""
    if limit < 0 or math.isinf(mean):
        return 0.0
    if mean <= 0 or math.isinf(limit):
        return 1.0
    count = math.floor(limit)
    if mean > 100:
        return 0.5 * math.erfc((mean - count - 0.5) / math.sqrt(2 * mean))
    term = total = math.exp(-mean)
    for k in range(1, count + 1):
        term *= mean / k
        total += term
        if k > mean and term < 1e-12:
            break
    return min(1.0, total)
