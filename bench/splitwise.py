"""Splitwise's machine splits: how many of 40 H100 machines compute prompts, how many decode.

    python -m bench.splitwise PERF_MODEL.csv TRACE.csv… [--flat-decode] [--json]

Splitwise (Patel et al., ISCA 2024) has 40 DGX-H100 in two pools: 35 for prompts and 5 for tokens
with its coding trace, 25 and 15 with its conversation trace. Here the splits are simulated,
placement in two strict pools, and the best is the one that bears the highest Poisson rate within
the paper's nine SLOs (its table VI): percentiles 50, 90 and 99 of the slowdown against an idle
DGX-A100 stay within 2, 3 and 6 for TTFT, within 1.25, 1.5 and 5 for the time between tokens and for
the end-to-end time.

Step times are fitted to the measured ones that were published with the paper's simulator
(`data/perf_model.csv` of Mutinifni/splitwise-sim); so are, from the same place, the model –
BLOOM-176B, its default, 329 GB of weights, 70 layers of 14,336, eight GPUs a machine – steps of
2,048 prompt tokens and of 512 sequences, and lengths that are drawn from the trace's two columns,
one independently of the other. KV goes layer by layer over 400 Gb/s, 5 ms of it not hidden.
`--flat-decode` lets a decode step take what it takes alone, whatever its batch and context: that
simulator looks its time up by the tokens that a step computes, one for each sequence.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from bench import tables
from cluster.planner.performance import DecodeCost, HandoffCost, Performance, PrefillCost
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Outcome
from cluster.simulator.workload import Arrival
from cluster.simulator.world import World

MACHINES = 40
PUBLISHED = {"code": 35, "conv": 25}
"""Machines for prompts, by what the trace's name ends with."""
QUANTILES = (0.5, 0.9, 0.99)
SLOWDOWNS = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}
LAYERS, WIDTH, WEIGHTS, MEMORY = 70, 14_336, 329e9, 8 * 80e9
KV_BYTES = 2 * LAYERS * WIDTH * 2
LIMITS = EngineLimits(max_tokens=2048, max_sequences=512, mixes=False, cache_share=0.0)
SECONDS = 30.0
"""Of arrivals, in every run: some thousand requests."""
PRECISION, STEP = 0.02, 1.15

Steps = dict[tuple[int, int], tuple[float, float]]
"""Seconds of a prefill and of a decode step, by (prompt tokens of each, sequences)."""


def measured(path: Path, hardware: str) -> Steps:
    """The medians for BLOOM-176B on eight GPUs of this hardware."""
    found: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            key = (row["model"], row["hardware"], row["tensor_parallel"])
            if key == ("bloom-176b", hardware, "8"):
                size = int(row["prompt_size"]), int(row["batch_size"])
                found[size].append(
                    (float(row["prompt_time"]) / 1e3, float(row["token_time"]) / 1e3)
                )
    return {
        size: (median(p for p, _ in rows), median(t for _, t in rows))
        for size, rows in found.items()
    }


def machine(steps: Steps, flat_decode: bool = False) -> Performance:
    """Fitted by least squares of relative errors: prefill to single prompts, decode to all."""
    alone = sorted((prompt, took) for (prompt, batch), (took, _) in steps.items() if batch == 1)
    floor = min(took for _, took in alone)
    rows = [(1.0, prompt, prompt * prompt) for prompt, _ in alone if prompt >= 512]
    base, token, pair = _fit(rows, [took for prompt, took in alone if prompt >= 512])
    rows = [(1.0, prompt * batch, batch) for prompt, batch in steps]
    first, context, sequence = _fit(rows, [took for _, took in steps.values()])
    decode = DecodeCost(first, context, sequence)
    if flat_decode:
        decode = DecodeCost(median(took for (_, b), (_, took) in steps.items() if b == 1), 0.0)
    return Performance(
        PrefillCost(base, token, pair, floor),
        decode,
        decode,
        1,
        HandoffCost(0.005, 400e9 / 8, LAYERS),
        KV_BYTES,
        int((MEMORY - WEIGHTS) / KV_BYTES),
        gpus=8,
        label="bloom-176b",
    )


def _fit(rows: Sequence[tuple[float, float, float]], took: Sequence[float]) -> list[float]:
    """Coefficients that are not negative: one that would be is left out."""
    matrix, values = np.array(rows), np.array(took)
    used = list(range(matrix.shape[1]))
    while True:
        scaled = matrix[:, used] / values[:, None]
        found, *_ = np.linalg.lstsq(scaled, np.ones(len(values)), rcond=None)
        if (found >= 0).all():
            result = [0.0] * matrix.shape[1]
            for column, value in zip(used, found, strict=True):
                result[column] = float(value)
            return result
        del used[int(found.argmin())]


class _Over(Exception):
    """So many requests are beyond a limit that its percentile cannot be within it."""


class _Watch:
    """Counts the requests beyond each of the nine limits."""

    def __init__(self, reference: Performance, requests: int) -> None:
        self._reference = reference
        self._allowed = [math.floor((1 - q) * requests + 1e-9) for q in QUANTILES]
        self._beyond = {name: [0, 0, 0] for name in SLOWDOWNS}

    def ended(self, outcome: Outcome) -> None:
        """Raises _Over."""
        alone = self._reference
        ttft = alone.prefill_seconds(outcome.prompt)
        tbt = alone.decode_seconds(1, outcome.prompt + outcome.output / 2)
        after = outcome.output - 1
        slower = {"ttft": outcome.ttft / ttft}
        if after:
            slower["tbt"] = outcome.tpot / tbt
            slower["e2e"] = (outcome.ttft + after * outcome.tpot) / (ttft + after * tbt)
        for name, value in slower.items():
            for i, limit in enumerate(SLOWDOWNS[name]):
                self._beyond[name][i] += value > limit
                if self._beyond[name][i] > self._allowed[i]:
                    raise _Over


def lengths(path: Path) -> tuple[list[int], list[int]]:
    """The trace's columns."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [int(r["ContextTokens"]) for r in rows], [int(r["GeneratedTokens"]) for r in rows]


def workload(columns: tuple[list[int], list[int]], rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals for SECONDS."""
    prompts, outputs = columns
    rng, arrivals, at = random.Random(seed), list[Arrival](), 0.0
    while (at := at + rng.expovariate(1.0)) < SECONDS * rate:
        arrivals.append(Arrival(at / rate, rng.choice(prompts), max(1, rng.choice(outputs))))
    return arrivals


def bears(
    worker: Performance, reference: Performance, prefill: int, arrivals: Sequence[Arrival]
) -> bool:
    """Whether so many of the machines for prompts, and the rest for tokens, meet all nine SLOs."""
    deployed = Deployment(
        worker, prefill, MACHINES - prefill, limits=LIMITS, late_admission=False,
        placement_mode="always", timeout=1e6,
    )  # fmt: skip
    world = World(deployed)
    world.on_end = _Watch(reference, len(arrivals)).ended
    try:
        world.run(arrivals)
    except _Over:
        return False
    return True


def throughput(
    worker: Performance,
    reference: Performance,
    prefill: int,
    columns: tuple[list[int], list[int]],
    near: float,
    seed: int = 0,
) -> float:
    """The highest rate, requests/s, that a split bears, within PRECISION."""
    low, high, rate = 0.0, math.inf, near
    while high > low * (1 + PRECISION) and rate > 1.0:
        if bears(worker, reference, prefill, workload(columns, rate, seed)):
            low = rate
        else:
            high = rate
        rate = (
            (low * high) ** 0.5 if low and high < math.inf else rate * (1.15 if low else 1 / 1.15)
        )
    return low


@dataclass(frozen=True)
class Found:
    """One workload's answer: machines for prompts, and every split's rate by these machines."""

    workload: str
    best: int
    published: int
    rates: dict[int, float]


def search(
    worker: Performance, reference: Performance, trace: Path, step: int, near: float
) -> Found:
    """Every `step`-th split from a quarter for prompts on, then those beside the best."""
    columns = lengths(trace)
    kind = trace.stem.rsplit("_", 1)[-1]
    rates: dict[int, float] = {}

    def look(prefill: int) -> None:
        nonlocal near
        rates[prefill] = throughput(worker, reference, prefill, columns, near)
        near = rates[prefill] or near

    for prefill in range(MACHINES // 4, MACHINES, step):
        look(prefill)
    best = max(rates, key=rates.__getitem__)
    for prefill in range(max(1, best - step + 1), min(MACHINES, best + step)):
        if prefill not in rates:
            look(prefill)
    best = max(rates, key=rates.__getitem__)
    return Found(kind, best, PUBLISHED[kind], dict(sorted(rates.items())))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.splitwise", description=__doc__)
    parser.add_argument("perf_model", type=Path)
    parser.add_argument("traces", type=Path, nargs="+", help="their names end with code or conv")
    parser.add_argument("--flat-decode", action="store_true", help="a step whatever its batch")
    parser.add_argument("--step", type=int, default=2, help="between the first splits (2)")
    parser.add_argument("--near", type=float, default=100.0, help="requests/s to begin with (100)")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    worker = machine(measured(asked.perf_model, "h100-80gb"), asked.flat_decode)
    reference = machine(measured(asked.perf_model, "a100-80gb"), asked.flat_decode)
    found = [search(worker, reference, each, asked.step, asked.near) for each in asked.traces]
    if asked.json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    for each in found:
        splits = [f"{p}+{MACHINES - p}" for p in each.rates]
        cells = [[s, f"{r:.1f}"] for s, r in zip(splits, each.rates.values(), strict=True)]
        print(f"{each.workload}: best {each.best}+{MACHINES - each.best}, "
              f"published {each.published}+{MACHINES - each.published}\n")  # fmt: skip
        print(tables.table(["prefill + decode", "requests/s"], cells) + "\n")


if __name__ == "__main__":
    main()
