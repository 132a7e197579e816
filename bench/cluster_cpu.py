"""A cluster on this machine against one vLLM: start-up, memory, TTFT, TPOT and throughput."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from bench import tables
from bench.measure import latencies, throughput
from bench.memory import ProcessMemory, tree
from bench.systems import ClusterSystem, VllmSystem
from bench.upstart import Up
from cluster.cli.access import channel
from cluster.cli.calls import cluster_view
from cluster.config import Config

IDLE_SECONDS = 10.0
"""Two of the workers' looks at what they hold."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cluster_cpu",
        description=(
            "Starts a cluster with `pdserve up`, then one vLLM with the same weights and settings "
            "in this process, and gives both the same requests in turn, never at once. Prompts are "
            "random and so never cached. Takes some four minutes on two cores; let nothing else "
            "run meanwhile."
        ),
        epilog="Ratios are cluster/vLLM: above 1 the cluster takes longer, or gives more tokens/s.",
    )
    add = parser.add_argument
    add("-f", "--file", type=Path, help="the cluster's YAML (default: the shipped demo cluster)")
    add("--runs", type=int, default=7, help="pairs per prompt length after a warm-up (default 7)")
    add("--prompts", type=int, nargs="+", default=[128, 512, 1024, 1900], metavar="TOKENS",
        help="prompt lengths (default 128 512 1024 1900)")  # fmt: skip
    add(
        "--output",
        type=int,
        default=64,
        help="tokens to generate (default 64); 1 is never handed off",
    )
    add("--concurrency", type=int, default=8, help="clients of the closed loop (default 8)")
    add("--load-prompt", type=int, default=512, help="prompt length of the closed loop (512)")
    add("--requests", type=int, default=48, help="requests per round of the closed loop (48)")
    add("--rounds", type=int, default=3, help="rounds of the closed loop after a warm-up (3)")
    add("--starts", type=int, default=1, help="starts to time; the last one is measured on (1)")
    add("--vllm-threads", type=int, metavar="N",
        help="threads of the one vLLM (default: what an engine of the cluster has)")  # fmt: skip
    add("--start-timeout", type=float, default=300, help="seconds for a start (default 300)")
    add("--json", action="store_true", help="print JSON, with ranges and phases, not tables")
    chosen = parser.parse_args(given)
    for name in ("runs", "output", "concurrency", "load_prompt", "requests", "rounds", "starts"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(chosen.prompts) < 1:
        parser.error("--prompts must be at least 1")
    return chosen


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    chosen = arguments()
    say(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="pds-bench-") as folder, stdout_to_stderr():
        results = asyncio.run(measure(chosen, Path(folder)))
    if chosen.json:
        print(json.dumps(results, indent=2))
        return
    *rows, load = results["rows"]
    print(tables.startup_table(results["startup"]), end="\n\n")
    print(tables.memory_table(results["memory"]), end="\n\n")
    print(tables.latency_table(rows), end="\n\n")
    print(tables.phase_table(rows), end="\n\n")
    print(tables.load_table(load))


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """vLLM and its processes log to stdout, where only the results belong."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


async def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = Config.load(chosen.file)
    model = config.models[0]
    starts = []
    for number in range(chosen.starts):
        up = Up(config.name, chosen.file, folder)
        try:
            say(f"pdserve up ({number + 1} of {chosen.starts})")
            up.start(chosen.start_timeout)
            say(f"ready after {up.ready_seconds:.1f} s")
            starts.append(up.ready_seconds)
            if number == chosen.starts - 1:
                from cluster.control.compose import engine_threads  # brings vLLM

                threads = chosen.vllm_threads or engine_threads(config, model, "prefill")
                results = await compare(chosen, config, up, threads)
        finally:
            stopped = up.stop()
            say(f"stopped in {stopped:.1f} s")
    parts = [asdict(part) for part in up.parts]
    results["startup"] = {
        "ready_seconds": up.ready_seconds,
        "first_line_seconds": up.first_line_seconds,
        "parts": parts,
        "all_ready_seconds": starts,
        "stop_seconds": stopped,
    }
    return results


async def compare(
    chosen: argparse.Namespace, config: Config, up: Up, threads: int
) -> dict[str, Any]:
    root = psutil.Process(up.pid)
    say("memory")
    at_ready = {row.pid: row for row in tree(root, 0, IDLE_SECONDS)}
    say(f"one vLLM with {threads} threads")
    vllm = await asyncio.to_thread(VllmSystem, config.models[0], threads)
    try:
        async with channel(up.grpc_address) as to:
            cluster = ClusterSystem(to, config.models[0].name)
            vocab = await cluster.vocab_size()
            rows = await latencies(
                cluster, vllm, chosen.prompts, chosen.output, chosen.runs, vocab, say
            )
            load = await throughput(
                cluster, vllm, chosen.load_prompt, chosen.output, chosen.concurrency,
                chosen.requests, chosen.rounds, vocab, say,
            )  # fmt: skip
            say("memory again")
            await asyncio.sleep(IDLE_SECONDS)
            memory = [_with(row, at_ready.get(row.pid)) for row in tree(root, 0, IDLE_SECONDS)]
            alone = tree(psutil.Process(), up.pid, IDLE_SECONDS)
            memory += [{**_with(row, None), "part": "one vLLM"} for row in alone]
            view = await cluster_view(to)
    finally:
        vllm.stop()
    return {
        "rows": [*rows, load],
        "memory": memory,
        "workers_resident_bytes": {w.worker_id: w.resident_bytes for w in view.workers},
        "vllm_threads": threads,
    }


def _with(row: ProcessMemory, ready: ProcessMemory | None) -> dict[str, Any]:
    return {**asdict(row), "rss_ready": ready.rss if ready else 0}


if __name__ == "__main__":
    main()
