"""DistServe's goodput against vLLM's, simulated: the five workloads of its evaluation.

    python -m bench.distserve [--seeds 8] [--corrected] [--json]

Replays the protocol of the published runs, not a steady state: 100 requests a GPU at 13B, 25 at 66B
and 175B, 50 for HumanEval, at the published grid of rates; goodput is where attainment crosses 90 %
between two of them. Step times are DistServe's own fits (`tests/data`). What is assumed, because it
is not published with them:

- Lengths. ShareGPT: those of the published 13B runs. HumanEval: log-normal, means 171 and 98
  tokens. LongBench: contexts cut to 1,900–2,048 tokens less the answer, a third of the documents
  shorter; two answers of three are a few words, one is a summary, 91 tokens in the mean.
- OPT-175B's step times: OPT-66B's on as many GPUs, linear parts by the layers' parameters (× 2.67),
  attention by layers × width (× 2).
- k pipeline stages are k workers of one stage's GPUs, each with its share of the KV cache: a prompt
  takes as long, and k of them are on the way at once.
- OPT-66B's layout on HumanEval and LongBench is that on ShareGPT.

`--corrected` scales the fits by what the published 13B runs took, request by request: the median of
TTFT at the lowest rate, of TPOT over the rates that are borne.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import tables
from cluster.planner.performance import DecodeCost, HandoffCost, Performance, PrefillCost
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Targets, attainment
from cluster.simulator.workload import Arrival
from cluster.simulator.world import World

DATA = Path(__file__).parent.parent / "tests" / "data"
UNMIXED = EngineLimits(max_tokens=2048, mixes=False, cache_share=0.0)
"""DistServe and the vLLM of its time: whole prompts, never in one step with decodes."""
NVLINK = 200e9
SHARE = 0.9
CORRECTIONS = {"distserve": (1.0, 1.28), "vllm": (0.88, 1.17)}
"""Measured ÷ simulated seconds of prefill and of decode, in the published 13B runs. DistServe's
prefill is left as it is: TTFT's quantiles are met with it."""

Lengths = Callable[[random.Random], tuple[int, int]]


@dataclass(frozen=True)
class Model:
    """Layers and width of an OPT model; `like` is the one whose step times were published."""

    like: str
    layers: int
    width: int


OPT = {
    "13b": Model("facebook/opt-13b", 40, 5120),
    "66b": Model("facebook/opt-66b", 64, 9216),
    "175b": Model("facebook/opt-66b", 96, 12288),
}


@dataclass(frozen=True)
class Layout:
    """GPUs of one stage, stages, and the tokens that the KV caches of all of them hold."""

    tensor: int
    stages: int
    kv_tokens: int


@dataclass(frozen=True)
class Workload:
    """One of the evaluation's, with what was measured: requests/s and GPU at 90 %."""

    name: str
    model: str
    lengths: Lengths
    targets: Targets
    prefill: Layout
    decode: Layout
    whole: Layout
    per_gpu: int
    rates: tuple[float, ...]
    distserve: float
    vllm: float


def sharegpt() -> Lengths:
    with (DATA / "distserve_opt13b_sharegpt.csv").open() as lines:
        pairs = sorted({(int(row["prompt"]), int(row["output"])) for row in csv.DictReader(lines)})
    return lambda rng: rng.choice(pairs)


def humaneval(rng: random.Random) -> tuple[int, int]:
    return (
        max(20, min(500, round(171.3 * rng.lognormvariate(-0.08, 0.4)))),
        max(5, min(700, round(98.2 * rng.lognormvariate(-0.245, 0.7)))),
    )


def longbench(rng: random.Random) -> tuple[int, int]:
    long = rng.random() < 1 / 3
    output = rng.lognormvariate(5.3, 0.6) if long else rng.lognormvariate(1.8, 0.7)
    answer = max(1, min(1000, round(output)))
    prompt = rng.uniform(1900, 2048)
    if rng.random() < 1 / 3:
        prompt = rng.uniform(800, 1900)
    return round(min(prompt, 2040 - answer)), answer


def workloads() -> tuple[Workload, ...]:
    chat = sharegpt()
    prefill66, decode66 = Layout(4, 1, 78_496), Layout(2, 2, 78_512)
    small = tuple(0.0625 * i for i in range(1, 17))
    return (
        Workload(
            "13B ShareGPT", "13b", chat, Targets(0.25, 0.1), Layout(2, 1, 163_008),
            Layout(1, 1, 66_144), Layout(1, 1, 66_144), 100,
            (0.25, 0.5, 1, 1.5, 2, 2.25, 2.5, 3, 3.5), 2.30, 0.50,
        ),
        Workload(
            "66B ShareGPT", "66b", chat, Targets(2.5, 0.15), prefill66, decode66,
            Layout(4, 1, 78_496), 25, (*small, 1.125, 1.25), 0.955, 0.347,
        ),
        Workload(
            "66B HumanEval", "66b", humaneval, Targets(0.125, 0.2), prefill66, decode66,
            Layout(4, 1, 78_496), 50, tuple(0.125 + 0.25 * i for i in range(12)), 1.144, 0.200,
        ),
        Workload(
            "66B LongBench", "66b", longbench, Targets(15.0, 0.15), prefill66, decode66,
            Layout(4, 1, 78_496), 25, small, 0.530, 0.125,
        ),
        Workload(
            "175B ShareGPT", "175b", chat, Targets(4.0, 0.2), Layout(3, 3, 76_192),
            Layout(4, 3, 126_160), Layout(8, 1, 59_520), 25,
            tuple(0.03125 * i for i in range(1, 15)), 0.2015, 0.101,
        ),
    )  # fmt: skip


def worker(
    model: str, layout: Layout, system: str = "distserve", corrected: bool = False
) -> Performance:
    """One stage's GPUs as a worker, by the published fits of this system's steps."""
    suffix = "" if system == "distserve" else "_vllm"
    fits = json.loads((DATA / f"distserve_a100{suffix}_profile.json").read_text())
    shape = OPT[model]
    fit = fits[shape.like][str(layout.tensor)]
    like = next(m for m in OPT.values() if m.like == shape.like)
    linear = shape.layers * shape.width**2 / (like.layers * like.width**2)
    attention = shape.layers * shape.width / (like.layers * like.width)
    first, token, pair = (ms / 1e3 for ms in fit["prefill"])

    def decode(name: str) -> DecodeCost:
        base, context, sequence = (ms / 1e3 for ms in fit[name])
        return DecodeCost(base * linear, context * attention, sequence * linear)

    performance = Performance(
        PrefillCost(first * linear, token * linear, pair * attention),
        decode("decoding_smallbs"),
        decode("decoding_largebs"),
        fit["decoding_large_small_bs_threshold"],
        HandoffCost(0.0005, NVLINK, shape.layers),
        kv_bytes_per_token=2 * shape.layers * shape.width * 2,
        kv_capacity=layout.kv_tokens // layout.stages,
        gpus=layout.tensor,
        label=f"opt-{model}",
    )
    return performance.scaled(*CORRECTIONS[system]) if corrected else performance


def deployment(workload: Workload, system: str, corrected: bool = False) -> Deployment:
    """The published layout of "distserve" or "vllm"; both place at once."""
    if system == "vllm":
        layout = workload.whole
        return Deployment(
            worker(workload.model, layout, system, corrected),
            both=layout.stages,
            limits=UNMIXED,
            late_admission=False,
            timeout=1e6,
        )
    return Deployment(
        worker(workload.model, workload.prefill, system, corrected),
        prefill=workload.prefill.stages,
        decode=workload.decode.stages,
        limits=UNMIXED,
        decode_performance=worker(workload.model, workload.decode, system, corrected),
        late_admission=False,
        placement_mode="always",
        timeout=1e6,
    )


def met(workload: Workload, system: str, rate: float, seeds: int, corrected: bool = False) -> float:
    """Attainment at so many requests/s and GPU, over so many draws of the published run."""
    deployed = deployment(workload, system, corrected)
    outcomes = []
    for seed in range(seeds):
        rng = random.Random(f"{workload.name}/{rate}/{seed}")
        at, arrivals = 0.0, []
        for _ in range(workload.per_gpu * deployed.gpus):
            arrivals.append(Arrival(at, *workload.lengths(rng)))
            at += rng.expovariate(rate * deployed.gpus)
        outcomes += World(deployed).run(arrivals)
    return attainment(outcomes, workload.targets)


def goodput(workload: Workload, system: str, seeds: int, corrected: bool = False) -> float:
    """Requests/s and GPU at which attainment falls through 90 %, between two rates of the grid."""
    before: tuple[float, float] | None = None
    for rate in workload.rates:
        share = met(workload, system, rate, seeds, corrected)
        if share < SHARE:
            if before is None:
                return rate * share / SHARE
            last, above = before
            return last + (above - SHARE) / (above - share) * (rate - last)
        before = rate, share
    return workload.rates[-1]


@dataclass(frozen=True)
class Row:
    """Goodput of both systems, requests/s and GPU, and what was measured."""

    workload: str
    distserve: float
    vllm: float
    measured_distserve: float
    measured_vllm: float

    @property
    def ratio(self) -> float:
        return self.distserve / self.vllm

    @property
    def measured(self) -> float:
        return self.measured_distserve / self.measured_vllm


def rows(chosen: Sequence[Workload], seeds: int, corrected: bool = False) -> list[Row]:
    return [
        Row(
            each.name,
            goodput(each, "distserve", seeds, corrected),
            goodput(each, "vllm", seeds, corrected),
            each.distserve,
            each.vllm,
        )
        for each in chosen
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distserve", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="draws of every published run (8)")
    parser.add_argument("--corrected", action="store_true", help="steps as the 13B runs had them")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = rows(workloads(), asked.seeds, asked.corrected)
    if asked.json:
        print(json.dumps([{**vars(row), "ratio": row.ratio} for row in found], indent=2))
        return
    head = ["workload", "DistServe", "measured", "vLLM", "measured", "ratio", "measured", "off"]
    print(
        tables.table(
            head,
            [
                [
                    row.workload,
                    f"{row.distserve:.3f}",
                    f"{row.measured_distserve:.3f}",
                    f"{row.vllm:.3f}",
                    f"{row.measured_vllm:.3f}",
                    f"{row.ratio:.2f}",
                    f"{row.measured:.2f}",
                    f"{row.ratio / row.measured - 1:+.0%}",
                ]
                for row in found
            ],
        )
    )


if __name__ == "__main__":
    main()
