"""Predicted against measured: a short profile, the simulator's word, then the cluster's.

    python -m bench.predicted [--device cuda] [--out FOLDER]
    python -m bench.predicted --replay FOLDER

Starts a cluster of one prefill and one decode worker with real engines, measures them with `pdserve
profile`, and for three workloads at three rates predicts TTFT and TPOT of the very arrivals that it
sends, and the share of them that meets twice what one request alone is predicted to take, of both.
The rates are shares of what the fuller worker is predicted to bear. Every workload's middle rate is
sent twice: how far one measurement is off the other is what no prediction can be better than.

Without --device it is the shipped demo cluster; four minutes on two cores, with nothing else on
them. With --device cuda it is Llama-3.1-8B with made-up weights on two cards of one machine, its
processes started without Ray; eight minutes, half of which the engines take to start. It needs what
bench.gpu_handoff needs, and the packages of the router, the store and their clients. --device cpu
runs the same with a tiny model: that shows that the bench works, and measures nothing.

The machine's own pace is measured at rest before the profile, after it and before each load: a
profile says nothing of an hour in which others take a part of the cores.

What was measured is written after every load. --replay predicts a former run's loads anew, with the
code that is here, and sends nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.gpu.machine import cards, packages
from bench.predicted.clients import Clients, Seen
from bench.predicted.clusters import START_SECONDS, Cluster, demo, on_cards
from bench.predicted.pace import Pace
from bench.predicted.record import Load, Ran, Record, order
from bench.predicted.rows import table
from bench.predicted.setting import DEMO, GPUS, Setting
from cluster.cli import profile
from cluster.cli.terminal import Terminal
from cluster.config import Config
from cluster.planner.hardware import HARDWARE
from cluster.planner.shape import load_shape
from cluster.simulator.engine import EngineLimits

DRAIN_SECONDS = 12.0
"""A load's last requests take no longer, as a rule."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.predicted",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], help="two cards, or a tiny model (the demo cluster)")
    add("--seconds", type=float, help="of arrivals, a rate (9; on cards 13)")
    add("--minutes", type=float, default=8.0, help="after which no load begins (8)")
    add("--eager", action="store_true", help="no compilation, no CUDA graphs: starts sooner")
    add("--out", type=Path, default=Path(os.environ.get("OUT", "predicted")), metavar="FOLDER",
        help="gets the table, the profile and every request ($OUT, or predicted)")  # fmt: skip
    add("--replay", type=Path, metavar="FOLDER", help="predict that run's loads anew")
    add("--json", action="store_true", help="print results.json, not the table")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if chosen.replay:
        print(table(Record.read(chosen.replay).rows()))
        return
    began = time.monotonic()
    out: Path = chosen.out
    out.mkdir(parents=True, exist_ok=True)
    found = cards() if chosen.device == "cuda" else []
    if chosen.device == "cuda" and len(found) < 2:
        sys.exit(f"two GPUs are needed and {len(found)} found; --device cpu tries the bench itself")
    gpu = next((n for n in HARDWARE if found and n in found[0][0]), "CPU")
    setting = GPUS if found else DEMO
    if chosen.seconds:
        setting = replace(setting, seconds=chosen.seconds)
    with tempfile.TemporaryDirectory(prefix="pds-predicted-") as name:
        folder = Path(name)
        config, cluster = (
            on_cards(folder, out / "logs", chosen.device == "cpu", chosen.eager)
            if chosen.device
            else demo(folder)
        )
        record = Record(out, about([name for name, _ in found]), ran(config, gpu, setting))
        try:
            measure(cluster, config, setting, record, began + 60 * chosen.minutes)
        finally:
            say("stopping")
            cluster.stop()
    print((out / ("results.json" if chosen.json else "table.md")).read_text())


def measure(
    cluster: Cluster, config: Config, setting: Setting, record: Record, ends: float
) -> None:
    """All of it, or what there is time for."""
    say("starting the cluster")
    cluster.start(START_SECONDS)
    pace = Pace()
    say("measuring the profile")
    wanted = profile.Wanted(
        config.models[0].path, record.ran.gpu, 1, "", setting.max_prompt, setting.max_batch,
        record.profile_path, shared=True,
    )  # fmt: skip
    profile.run(Terminal(), cluster.grpc_address, "", wanted, as_json=False)
    pace.measure()
    worker = record.split().worker
    clients = Clients(
        setting.clients, cluster.grpc_address, config.models[0].name, record.ran.shape.vocab
    )
    try:
        for workload, share, run in order(list(setting.workloads), setting.shares):
            if time.monotonic() + setting.seconds + DRAIN_SECONDS > ends:
                say(f"no time is left for {workload} at {share:.0%}")
                continue
            rate = share * setting.bearable(worker, workload)
            now = pace.measure()
            record.about["pace at rest, after the profile and before each load"] = str(pace)
            seen = tuple(clients.measure(setting.arrivals(workload, rate)))
            if run == 0:
                record.loads.append(Load(workload, rate, seen))
            else:
                at = next(i for i, load in enumerate(record.loads)
                          if (load.workload, load.rate) == (workload, rate))  # fmt: skip
                record.loads[at] = replace(record.loads[at], again=seen)
            record.save()
            say(f"{workload} at {rate:.1f}/s: {told(seen)}; the machine's pace was {now:.2f}")
    finally:
        clients.close()


def told(seen: Sequence[Seen]) -> str:
    failed, late = sum(bool(s.error) for s in seen), max(s.late for s in seen)
    over = sorted({s.transport for s in seen} - {""})
    return (
        f"{len(seen)} requests, {failed} failed, at most {late * 1e3:.0f} ms late, handed off over "
        f"{' and '.join(over) or 'nothing'}"
    )


def ran(config: Config, gpu: str, setting: Setting) -> Ran:
    model, shape = config.models[0], load_shape(config.models[0].path)
    return Ran(
        shape,
        gpu,
        (model.kv_cache_bytes or 0) // shape.kv_bytes_per_token,
        EngineLimits(model.max_num_batched_tokens, model.max_num_seqs),
        config.placement.disaggregate,
        dict(setting.workloads),
    )


def about(found: list[str]) -> dict[str, str]:
    machine = f"{len(found)} × {found[0]}" if found else platform.processor() or "CPU"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{machine}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "software": packages(),
        "command": "python -m bench.predicted " + " ".join(sys.argv[1:]),
    }


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
