"""What is left of a system's goodput when more comes than it can serve.

    .venv/bin/python -m bench.overload [--json] [--systems …] [--loads …]

One router alone on a core, in front of simulated engines with an 8B model's times on a small GPU;
engines and clients share the other core. First the capacity: what pdserve ends a second with so
many requests under way at any time. Then an open loop: requests come as a Poisson process at
multiples of it, and none waits for another. Those of a load's first and last seconds are left out.
A request is good if its client saw the first token within 2 s and 0.1 s per token from there on.
The proxy has the same engines, each of which serves requests whole.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.streams.clients import Client, GrpcClient, HttpClient
from bench.streams.open_loop import TIMEOUT_SECONDS, LoadRow, Requests
from bench.streams.processes import Process
from bench.streams.setting import Disaggregate, Load
from cluster.obs.garbage import keep_what_is_loaded
from cluster.store.embedded import EmbeddedStore

SYSTEMS = ("pdserve-grpc", "pdserve-http", "fastapi-httpx")
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
AT_ONCE = 256
PATIENT_SECONDS = 60.0
"""Timeout of the requests that measure the capacity: a class of which none is refused."""

LEARNING_SECONDS = 8.0
WARM_UP_SECONDS, TAIL_SECONDS = 3.0, 2.0
"""Requests that come before and after those that are counted: they meet the same load."""

SEED = 11


def start(system: str, load: Load, store_url: str, urls: dict[str, list[str]]) -> Process:
    if system.startswith("pdserve"):
        return Process("ours", {0}, load=vars(load), store_url=store_url)
    return Process("minimal", {0}, urls=urls)


def client_of(system: str, process: Process, timeout: float = TIMEOUT_SECONDS) -> Client:
    if system == "pdserve-grpc":
        return GrpcClient(process.said["grpc"], timeout=timeout)
    return HttpClient(process.said["http"], timeout=timeout)


async def capacity_of(process: Process, seconds: float) -> float:
    client = client_of("pdserve-grpc", process, PATIENT_SECONDS)
    try:
        return await Requests(client, SEED).capacity(AT_ONCE, seconds, LEARNING_SECONDS)
    finally:
        await client.close()


async def one(
    system: str, process: Process, workers: Process, load: float, rate: float, seconds: float
) -> LoadRow:
    """One load, until its last request has ended."""
    client = client_of(system, process)
    begin, end = WARM_UP_SECONDS, WARM_UP_SECONDS + seconds
    try:
        arriving = asyncio.create_task(Requests(client, SEED).arrive(rate, end + TAIL_SECONDS))
        await asyncio.sleep(begin)
        cpu, beside = process.cpu_seconds(), _beside(workers)
        await asyncio.sleep(seconds)
        cpu, beside = process.cpu_seconds() - cpu, _beside(workers) - beside
        seen = [outcome for outcome in await arriving if begin <= outcome.at < end]
        shares = {"system": round(cpu / seconds, 2), "beside": round(beside / seconds, 2)}
        return LoadRow.of(system, load, seconds, seen, shares)
    finally:
        await client.close()


def _beside(workers: Process) -> float:
    """CPU seconds on the other core: of the engines, and of the clients, which run here."""
    return workers.cpu_seconds() + time.process_time()


def run(
    systems: list[str], loads: list[float], seconds: float, disaggregate: Disaggregate
) -> tuple[float, list[LoadRow]]:
    """The capacity, and a row for each system and load."""
    os.sched_setaffinity(0, {1})
    keep_what_is_loaded()
    rows: list[LoadRow] = []
    setting = Load(0, 0.0, disaggregate, finite=True)
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddedStore.start(Path(folder))
        workers = Process("workers", {1}, load=vars(setting), store_url=store.url)
        try:
            ours = start("pdserve-grpc", setting, store.url, {})
            capacity = asyncio.run(capacity_of(ours, seconds))
            ours.stop()
            _say(f"capacity: {capacity:.1f} requests a second with {AT_ONCE} under way")
            for system in systems:
                process = start(system, setting, store.url, workers.said["urls"])
                try:
                    for load in loads:
                        rate = load * capacity
                        row = asyncio.run(one(system, process, workers, load, rate, seconds))
                        _say(row.text())
                        rows.append(row)
                finally:
                    process.stop()
        finally:
            workers.stop()
            store.stop()
    return capacity, rows


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(rows: list[LoadRow]) -> str:
    """For people."""
    heads = "system load offered/s good/s attained refused refusal-p50 refusal-p99 late"
    lines = ["".join(f"{head:>14}" for head in heads.split())]
    for row in rows:
        answers = [f"{row.refusal_ms[q]:.0f} ms" if row.refusal_ms else "-" for q in ("p50", "p99")]
        cells = [
            row.system, f"{row.load:g}", f"{row.offered_per_s:.1f}", f"{row.goodput_per_s:.1f}",
            f"{row.attainment:.1%}", f"{row.refused_share:.1%}", *answers, str(row.refusals_late),
        ]  # fmt: skip
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--loads", nargs="+", type=float, default=list(LOADS))
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load (default 8)")
    parser.add_argument("--disaggregate", choices=("always", "auto", "never"), default="auto")
    given = parser.parse_args()
    capacity, rows = run(given.systems, given.loads, given.seconds, given.disaggregate)
    if given.json:
        said = {"capacity_per_s": capacity, "rows": [row.values() for row in rows]}
        print(json.dumps(said))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
