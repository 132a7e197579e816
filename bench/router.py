"""What a router costs: CPU per token, tokens per second and core, added time to first token.

    .venv/bin/python -m bench.router [--json] [--systems …] [--streams …]

Simulated engines on one core, the system under test alone on another; the clients share the
engines' core, so that what is measured is the system's own CPU time. Loads: paced, each token a
message; tens, the same at ten tokens a second of every stream; fours, as many tokens as paced, four
a message; saturated, the engines as fast as they can; busy, short requests at 60 % of the rate that
the system serves when as many as `--streams` are always under way (gRPC only). The time to first
token is taken on workers of their own that are always free, by the same kind of client through the
system and past it, in turns: past it one engine serves the request whole, through pdserve two do.
What the router alone adds is over what the same two workers take without one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bench.streams.busy import measure_busy
from bench.streams.clients import Client, GrpcClient, HttpClient
from bench.streams.hops import HopsClient
from bench.streams.light import LightClient
from bench.streams.measure import Probes, Row, measure
from bench.streams.processes import Process
from bench.streams.setting import PROBE, Disaggregate, Load
from cluster.store.embedded import EmbeddedStore

SYSTEMS = ("pdserve-grpc", "pdserve-http", "fastapi-httpx", "ray-serve")
STREAMS = (1, 100)
TOKENS_PER_SECOND = 2500.0
"""Of a paced load with a hundred streams or more: what clients on one core can take singly."""

GAPS = {"tens": 0.1, "saturated": 1e-4, "busy": 0.02}
LOADS = ("paced", "tens", "fours", "saturated", "busy")


def load_of(kind: str, streams: int, disaggregate: Disaggregate = "always") -> Load:
    """One of LOADS, for so many streams."""
    gap = max(0.01, streams / TOKENS_PER_SECOND)
    if kind == "fours":
        return Load(streams, 4 * gap, disaggregate, tokens_per_output=4)
    return Load(streams, GAPS.get(kind, gap), disaggregate)


def start(system: str, load: Load, store_url: str, urls: dict[str, list[str]]) -> Process:
    arguments: dict[str, Any] = {"load": vars(load)}
    cores = {0}
    if system.startswith("pdserve"):
        return Process("ours", cores, store_url=store_url, **arguments)
    if system == "ray-serve":
        return Process("ray_serve", cores, urls=urls, **arguments)
    return Process("minimal", cores, urls=urls, **arguments)


def client_of(system: str, process: Process) -> Client:
    if system == "pdserve-grpc":
        return GrpcClient(process.said["grpc"])
    return HttpClient(process.said["http"])


def probes_of(system: str, process: Process, workers: Process) -> Probes:
    through = client_of(system, process)
    if system == "pdserve-grpc":
        past, light = GrpcClient(workers.said["grpc"]), LightClient(process.said["grpc"])
        return Probes(through, past, light, HopsClient(workers.said["records"]))
    return Probes(through, HttpClient(workers.said["urls"][PROBE][0]))


def loader_of(system: str, kind: str, process: Process) -> Client:
    """For the load itself: light where its core would be full before the system's."""
    if system == "pdserve-grpc" and kind in ("saturated", "busy"):
        return LightClient(process.said["grpc"])
    return client_of(system, process)


async def one(system: str, load: Load, kind: str, store_url: str, workers: Process) -> Row:
    process = start(system, load, store_url, workers.said["urls"])
    probes, loader = probes_of(system, process, workers), loader_of(system, kind, process)
    try:
        if kind == "busy":
            return await measure_busy(system, load, probes, loader, process, workers)
        return await measure(system, load, kind, probes, loader, process)
    finally:
        await probes.close()
        await loader.close()
        process.stop()


def run(
    systems: list[str], streams: list[int], kinds: list[str], disaggregate: Disaggregate
) -> list[Row]:
    rows = []
    os.sched_setaffinity(0, {1})
    with tempfile.TemporaryDirectory() as folder:
        for count in streams:
            for kind in kinds:
                load = load_of(kind, count, disaggregate)
                store = EmbeddedStore.start(Path(folder))
                workers = Process("workers", {1}, store_url=store.url, load=vars(load))
                try:
                    for system in systems:
                        row = asyncio.run(one(system, load, kind, store.url, workers))
                        rows.append(row)
                        print(row.text(), flush=True)
                finally:
                    workers.stop()
                    store.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=["paced", "saturated"])
    parser.add_argument("--disaggregate", choices=("always", "auto", "never"), default="always")
    arguments = parser.parse_args()
    if "busy" in arguments.loads and arguments.systems != ["pdserve-grpc"]:
        parser.error("the load busy is of pdserve-grpc alone")
    rows = run(arguments.systems, arguments.streams, arguments.loads, arguments.disaggregate)
    if arguments.json:
        print(json.dumps({"rows": [row.values() for row in rows]}))


if __name__ == "__main__":
    main()
