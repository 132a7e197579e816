"""What a request costs a router besides its tokens: CPU, and the way to the first token by phase.

    .venv/bin/python -m bench.requests [--json] [--requests N] [--gap SECONDS] [--profile FILE]

One short request after the other through one router, each split over two simulated workers that are
always free. The router has one core, workers and client share the other. CPU time is the router's
process', less what it takes at rest; phases are those that the router reports of each request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc.aio

from bench.streams.processes import Process
from bench.streams.setting import PROBE, PROMPT, Disaggregate, Load
from cluster.store.embedded import EmbeddedStore
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

WARM_UP = 200
REST_SECONDS = 3.0
PAUSE_SECONDS = 1.0
"""After the warm-up, and before the CPU time at rest is read."""


@dataclass(frozen=True)
class Request:
    """Seconds: to the first token at the client, and the router's phases by name."""

    first: float
    phases: dict[str, float]


async def ask(stub: Any) -> Request:
    """A request of two tokens."""
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=2)
    request = inference_pb2.GenerateRequest(model=PROBE, text=PROMPT, sampling=sampling)
    began, first = time.perf_counter(), 0.0
    async for message in stub.Generate(request, timeout=60):
        if not first:
            first = time.perf_counter() - began
        if message.HasField("completed"):
            phases = message.completed.completions[0].phases
            names = [field.name for field in phases.DESCRIPTOR.fields]
            return Request(first, {name: getattr(phases, name) for name in names})
    raise ValueError("the stream ended without its report")


async def measure(process: Process, requests: int, gap: float) -> dict[str, Any]:
    """The row of a run."""
    async with grpc.aio.insecure_channel(process.said["grpc"]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for _ in range(WARM_UP):
            await ask(stub)
        await asyncio.sleep(PAUSE_SECONDS)
        cpu, began = process.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(REST_SECONDS)
        at_rest = (process.cpu_seconds() - cpu) / (time.perf_counter() - began)
        cpu, began = process.cpu_seconds(), time.perf_counter()
        seen = []
        for _ in range(requests):
            seen.append(await ask(stub))
            await asyncio.sleep(gap)
        seconds = time.perf_counter() - began
        cpu = process.cpu_seconds() - cpu - at_rest * seconds
    firsts = sorted(1e3 * request.first for request in seen)
    phases = {
        name.removesuffix("_seconds"): 1e3 * median(request.phases[name] for request in seen)
        for name in seen[0].phases
    }
    return {
        "requests": requests,
        "cpu_us": 1e6 * cpu / requests,
        "at_rest_share": at_rest,
        "ttft_ms": {"p50": median(firsts), "p99": firsts[int(0.99 * (len(firsts) - 1))]},
        "phase_ms": phases,
    }


def run(
    requests: int, gap: float, disaggregate: Disaggregate, profile: str | None
) -> dict[str, Any]:
    """Starts what is needed, measures, and ends it."""
    os.sched_setaffinity(0, {1})
    load = Load(1, 1e-3, disaggregate)
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddedStore.start(Path(folder))
        workers = Process("workers", {1}, store_url=store.url, load=vars(load))
        try:
            router = Process("ours", {0}, store_url=store.url, load=vars(load), profile=profile)
            try:
                return asyncio.run(measure(router, requests, gap))
            finally:
                router.stop()
        finally:
            workers.stop()
            store.stop()


def text(row: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {value:.2f}" for name, value in row["phase_ms"].items())
    first = row["ttft_ms"]
    return (
        f"{row['requests']} requests: {row['cpu_us']:.0f} us of CPU each "
        f"({100 * row['at_rest_share']:.1f} % of a core at rest); first token "
        f"{first['p50']:.2f}/{first['p99']:.2f} ms; {phases} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--gap", type=float, default=0.0, help="seconds between two")
    parser.add_argument("--disaggregate", choices=("always", "auto", "never"), default="always")
    parser.add_argument("--profile", help="of the router's functions, for pstats; it slows it")
    arguments = parser.parse_args()
    row = run(arguments.requests, arguments.gap, arguments.disaggregate, arguments.profile)
    print(json.dumps(row) if arguments.json else text(row))


if __name__ == "__main__":
    main()
