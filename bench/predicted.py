"""Predicted against measured: a short profile, the simulator's word, then the cluster's.

    python -m bench.predicted [--seconds 9] [--profile FILE] [--json]

Starts the shipped demo cluster (real engines, one prefill and one decode worker), measures its
workers with `pdserve profile`, and for three workloads at three rates predicts TTFT and TPOT of the
very arrivals that it then sends, and the share of them that meets twice what one request alone is
predicted to take, of both. The rates are shares of what the fuller worker is predicted to bear.
Every workload's middle rate is sent twice: how far one measurement is off the other is what no
prediction can be better than. Takes four minutes on two cores; let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import grpc.aio

from bench import tables
from bench.upstart import Up
from cluster.cli import profile
from cluster.cli.access import channel
from cluster.cli.plan import worker_performance
from cluster.cli.terminal import Terminal
from cluster.config import Config
from cluster.planner.calibrate import quantile
from cluster.planner.hardware import hardware
from cluster.planner.performance import Performance
from cluster.planner.shape import load_shape
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Outcome, Percentiles, Targets, attainment, tpot, ttft
from cluster.simulator.workload import Arrival, poisson
from cluster.simulator.world import World
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

WORKLOADS = {"short prompts": (128, 64), "balanced": (512, 32), "long prompts": (1400, 12)}
"""Means of prompt and output tokens."""
SHARES = (0.25, 0.45, 0.65)
MAX_RATE = 25.0
SPREAD = 0.3
LOOSE = 2.0
"""Targets, as multiples of what one request alone is predicted to take."""
LONGEST = 1900


@dataclass(frozen=True)
class Again:
    """What the same arrivals took the second time."""

    ttft: Percentiles
    tpot: Percentiles


@dataclass(frozen=True)
class Row:
    """One workload at one rate; seconds."""

    workload: str
    rate: float
    requests: int
    predicted_ttft: Percentiles
    measured_ttft: Percentiles
    predicted_tpot: Percentiles
    measured_tpot: Percentiles
    targets: Targets
    predicted_share: float
    measured_share: float
    again: Again | None = None

    def errors(self) -> list[float]:
        """Relative, of the p50 and p90 of both."""
        return [
            *off(self.predicted_ttft, self.measured_ttft),
            *off(self.predicted_tpot, self.measured_tpot),
        ]

    def scatter(self) -> list[float]:
        """As `errors`, of a second measurement."""
        if self.again is None:
            return []
        return [
            *off(self.again.ttft, self.measured_ttft),
            *off(self.again.tpot, self.measured_tpot),
        ]


def off(predicted: Percentiles, measured: Percentiles) -> tuple[float, float]:
    return abs(predicted.p50 / measured.p50 - 1), abs(predicted.p90 / measured.p90 - 1)


def arrivals_of(prompt: int, output: int, rate: float, seconds: float) -> list[Arrival]:
    def lengths(rng: random.Random) -> tuple[int, int]:
        drawn = [n * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD) for n in (prompt, output)]
        return min(LONGEST - 128, max(8, round(drawn[0]))), min(128, max(3, round(drawn[1])))

    return poisson(rate, seconds, lengths, seed=prompt)


def bearable(worker: Performance, prompt: int, output: int, sequences: int) -> float:
    """Requests/s at which a worker of either role would always be busy."""
    batch = min(sequences, 16)
    step = worker.decode_seconds(batch, batch * (prompt + output / 2))
    return min(1 / worker.prefill_seconds(prompt), batch / (step * output), MAX_RATE)


async def measure(
    to: grpc.aio.Channel, model: str, vocab: int, arrivals: list[Arrival]
) -> list[Outcome]:
    """What became of each, as the router reports it; no two runs share a prompt."""
    stub = inference_pb2_grpc.InferenceStub(to)
    rng = random.Random()

    async def one(arrival: Arrival) -> Outcome:
        ids = [rng.randrange(1, vocab) for _ in range(arrival.prompt)]
        request = inference_pb2.GenerateRequest(
            model=model,
            token_ids=inference_pb2.TokenIds(ids=ids),
            sampling=common_pb2.SamplingParams(
                temperature=0, max_tokens=arrival.output, ignore_eos=True
            ),
        )
        await asyncio.sleep(max(0.0, begins + arrival.at - time.monotonic()))
        report = None
        async for message in stub.Generate(request, timeout=120):
            if message.HasField("completed"):
                (report,) = message.completed.completions
        assert report is not None
        return Outcome(
            arrival.kind,
            arrival.at,
            arrival.prompt,
            arrival.output,
            report.ttft_seconds,
            report.tpot_seconds,
        )

    begins = time.monotonic() + 0.2
    return await asyncio.gather(*map(one, arrivals))


async def compare(address: str, config: Config, worker: Performance, seconds: float) -> list[Row]:
    model = config.models[0]
    limits = EngineLimits(model.max_num_batched_tokens, model.max_num_seqs)
    mode = config.placement.disaggregate
    rows = []
    async with channel(address) as to:
        stub = inference_pb2_grpc.InferenceStub(to)
        listed = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
        vocab = listed.models[0].vocab_size
        for name, (prompt, output) in WORKLOADS.items():
            most = bearable(worker, prompt, output, model.max_num_seqs)
            for share in SHARES:
                arrivals = arrivals_of(prompt, output, share * most, seconds)
                deployed = Deployment(worker, 1, 1, 0, limits, placement_mode=mode)
                outcomes = World(deployed).run(arrivals)
                seen = await measure(to, model.name, vocab, arrivals)
                again = None
                if share == SHARES[1]:
                    second = await measure(to, model.name, vocab, arrivals)
                    again = Again(ttft(second), tpot(second))
                alone = World(deployed).run([Arrival(0.0, prompt, output)])
                targets = Targets(LOOSE * alone[0].ttft, LOOSE * alone[0].tpot)
                rows.append(
                    Row(
                        name,
                        share * most,
                        len(arrivals),
                        ttft(outcomes),
                        ttft(seen),
                        tpot(outcomes),
                        tpot(seen),
                        targets,
                        attainment(outcomes, targets),
                        attainment(seen, targets),
                        again,
                    )
                )
                print(f"{name} at {share * most:.1f}/s: {len(arrivals)}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.predicted", description=__doc__)
    parser.add_argument("--seconds", type=float, default=9.0, help="of arrivals, a rate (9)")
    parser.add_argument("--profile", type=Path, help="where to leave the profile")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    config = Config.load(None)
    path = Path(config.models[0].path)
    with tempfile.TemporaryDirectory(prefix="pds-bench-") as folder:
        up = Up(config.name, None, Path(folder))
        try:
            up.start(300)
            out = asked.profile or Path(folder, "profile.json")
            wanted = profile.Wanted(str(path), "CPU", 1, "", LONGEST, 32, out, shared=True)
            profile.run(Terminal(), up.grpc_address, "", wanted, as_json=False)
            worker = worker_performance(load_shape(str(path)), hardware("CPU"), 1, out)
            rows = asyncio.run(compare(up.grpc_address, config, worker, asked.seconds))
        finally:
            up.stop()
    if asked.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)


def show(rows: Sequence[Row]) -> None:
    head = ["workload", "req/s", "n", "TTFT p50/p90 predicted", "measured",
            "TPOT p50/p90 predicted", "measured", "in time predicted", "measured"]  # fmt: skip
    print(
        tables.table(
            head,
            [
                [
                    row.workload,
                    f"{row.rate:.1f}",
                    str(row.requests),
                    *(
                        f"{p.p50 * 1e3:.1f}/{p.p90 * 1e3:.1f}"
                        for p in (
                            row.predicted_ttft, row.measured_ttft,
                            row.predicted_tpot, row.measured_tpot,
                        )
                    ),
                    f"{row.predicted_share:.0%}",
                    f"{row.measured_share:.0%}",
                ]
                for row in rows
            ],
        )
    )  # fmt: skip
    errors = sorted(error for row in rows for error in row.errors() if math.isfinite(error))
    print(f"\nms. Error: median {median(errors):.0%}, p90 {quantile(errors, 0.9):.0%}")
    scatter = sorted(error for row in rows for error in row.scatter())
    print(
        "Middle rates measured again: off the first time by "
        f"{median(scatter):.0%} in the median, {quantile(scatter, 0.9):.0%} at p90"
    )


if __name__ == "__main__":
    main()
