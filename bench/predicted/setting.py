"""What is predicted and sent, and on what."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.planner.performance import Performance
from cluster.simulator.workload import Arrival, poisson

SPREAD = 0.3
"""Of the lengths' logarithm."""


@dataclass(frozen=True)
class Setting:
    """Nine loads, and the profile that they are predicted from.

    Attributes:
        workloads: means of prompt and output tokens.
        shares: of what the fuller worker bears, the rates.
        longest_prompt, longest_output: tokens; a workload's are drawn about its means.
        batch: sequences with which a decode worker counts as full.
        max_rate: requests/s.
        seconds: of arrivals, a load.
        clients: processes that send.
        max_prompt, max_batch: the largest that the profile measures.
    """

    workloads: Mapping[str, tuple[int, int]]
    shares: tuple[float, float, float]
    longest_prompt: int
    longest_output: int
    batch: int
    max_rate: float
    seconds: float
    clients: int
    max_prompt: int
    max_batch: int

    def arrivals(self, workload: str, rate: float) -> list[Arrival]:
        """The same ones each time."""
        means = self.workloads[workload]

        def lengths(rng: random.Random) -> tuple[int, int]:
            drawn = [n * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD) for n in means]
            return (
                min(self.longest_prompt, max(8, round(drawn[0]))),
                min(self.longest_output, max(3, round(drawn[1]))),
            )

        return poisson(rate, self.seconds, lengths, seed=means[0])

    def bearable(self, worker: Performance, workload: str) -> float:
        """Requests/s at which a worker of either role would always be busy."""
        prompt, output = self.workloads[workload]
        step = worker.decode_seconds(self.batch, self.batch * (prompt + output / 2))
        served = min(1 / worker.prefill_seconds(prompt), self.batch / (step * output))
        return min(served, self.max_rate)


DEMO = Setting(
    {"short prompts": (128, 64), "balanced": (512, 32), "long prompts": (1400, 12)},
    shares=(0.25, 0.45, 0.65),
    longest_prompt=1772,
    longest_output=128,
    batch=16,
    max_rate=25.0,
    seconds=9.0,
    clients=1,
    max_prompt=1900,
    max_batch=32,
)
"""The shipped model on two cores; also for the tiny one that tries the bench out."""

GPUS = Setting(
    {"chat": (256, 400), "balanced": (1024, 256), "summarise": (6000, 64)},
    shares=(0.3, 0.55, 0.8),
    longest_prompt=8000,
    longest_output=800,
    batch=128,
    max_rate=60.0,
    seconds=13.0,
    clients=4,
    max_prompt=8192,
    max_batch=128,
)
"""Llama-3.1-8B on a card a worker."""
