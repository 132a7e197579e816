"""How fast planning is: a decision at a thousand workers, the simulator, the advisor.

    python -m bench.planning [--json] [--advisor TRACE]

The decision is the core's that the controller calls, on a fleet and traffic of that size, in calm,
in a rise and where the budget is too small. The simulator plays chat on 16 and on 1,000 workers, on
one core. The advisor is asked about 16 GPUs on a trace, with the cores there are; without
`--advisor` on an hour of the same chat. Wall-clock seconds; let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import tables
from cluster.advisor.advice import advise
from cluster.advisor.pool import Pool
from cluster.advisor.question import Question
from cluster.planner.demand import Lengths
from cluster.planner.hardware import hardware
from cluster.planner.planner import Planner
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.state import ClassTargets, Observed, Policy, Traffic, WorkerSeen
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.goodput import Goal
from cluster.simulator.outcome import parse_slo
from cluster.simulator.traces import read_trace
from cluster.simulator.workload import Arrival, lognormal, poisson
from cluster.simulator.world import World

SHAPE, GPU = load_shape("llama-3.1-8b"), hardware("H200")
WORKER = roofline(SHAPE, GPU)
PROMPT, OUTPUT = lognormal(1155, 1020, 1, 8000), lognormal(211, 129, 1, 1000)
LIMITS = EngineLimits(max_tokens=2048)
PER_WORKER = 7.0
"""Requests/s and worker: about 60 % of what it bears."""


def lengths(rng: random.Random) -> tuple[int, int]:
    return PROMPT(rng), OUTPUT(rng)


def decisions(workers: int, classes: int = 3) -> list[dict[str, Any]]:
    """Seconds of the slowest of twelve decisions each, in three situations."""
    rng = random.Random(2)
    rows = []
    for name, rate, budget in (
        ("calm", PER_WORKER, 2 * workers),
        ("load doubles", 2 * PER_WORKER, 2 * workers),
        ("out of reach", 4 * PER_WORKER, workers),
    ):
        policy = Policy({"default": budget}, max_step=64)
        kinds = [f"class{i}" for i in range(classes)]
        planner = Planner(policy, WORKER, {k: ClassTargets(1.0, 0.03) for k in kinds})
        seen = tuple(
            WorkerSeen(f"w{i}", "decode" if i % 3 == 2 else "prefill", "ready")
            for i in range(workers)
        )
        took = []
        for step in range(12):
            at = step * policy.interval
            now = rate if step >= 6 else PER_WORKER
            traffic = {
                kind: Traffic(
                    now * workers / classes, tuple(Lengths(*lengths(rng)) for _ in range(256))
                )
                for kind in kinds
            }
            observed = Observed(seen, traffic, at)
            began = time.perf_counter()
            planner.step(at, observed)
            took.append(time.perf_counter() - began)
        rows.append({"workers": workers, "situation": name, "seconds": max(took)})
    return rows


def simulator(workers: int, requests: int) -> dict[str, Any]:
    """Requests that are simulated in a minute, with as many prefill as decode workers."""
    rate = PER_WORKER * workers
    arrivals = poisson(rate, requests / rate, lengths, 1)
    world = World(Deployment(WORKER, workers // 2, workers - workers // 2, limits=LIMITS))
    began = time.perf_counter()
    outcomes = world.run(arrivals)
    took = time.perf_counter() - began
    assert all(not each.error for each in outcomes)
    return {"workers": workers, "requests": len(arrivals), "a minute": len(arrivals) / took * 60}


def advisor(trace: Path | None, gpus: int = 16) -> dict[str, Any]:
    """Seconds of the whole answer."""
    began = time.perf_counter()
    arrivals: tuple[Arrival, ...]
    if trace is None:
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            for each in poisson(5.5, 3600.0, lengths, 3):
                values = {"at": each.at, "prompt": each.prompt, "output": each.output}
                file.write(json.dumps(values) + "\n")
            file.flush()
            arrivals = read_trace(Path(file.name), SHAPE.max_model_len).arrivals
    else:
        arrivals = read_trace(trace, SHAPE.max_model_len).arrivals
    goal = Goal(parse_slo("ttft=0.5,tpot=0.02"))
    question = Question(SHAPE, GPU, WORKER, gpus, goal, arrivals, GPU.dollars_per_hour, LIMITS)
    with Pool(lambda done, of: None) as pool:
        best = advise(question, pool.run).best
    return {
        "trace": trace.stem if trace else "chat",
        "requests": len(arrivals),
        "best": str(best.option),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.planning", description=__doc__)
    parser.add_argument("--advisor", type=Path, nargs="*", help="traces to ask about")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = {
        "decisions": [row for workers in (16, 1000) for row in decisions(workers)],
        "simulator": [simulator(16, 20_000), simulator(1000, 20_000)],
        "advisor": [advisor(trace) for trace in asked.advisor or [None]],
    }
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    for rows in found.values():
        head = list(rows[0])
        cells = [[v if isinstance(v, str) else f"{v:,.3g}" if isinstance(v, float) else f"{v:,}"
                  for v in row.values()] for row in rows]  # fmt: skip
        print(tables.table(head, cells) + "\n")


if __name__ == "__main__":
    main()
