"""Who holds how much memory, and who is busy while nothing is asked, in a tree of processes."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_RAY = {
    "gcs_server": "gcs_server",
    "raylet/raylet": "raylet",
    "runtime_env/agent": "runtime env agent",
    "dashboard/agent": "dashboard agent",
    "dashboard/dashboard": "dashboard",
    "ray::RuntimeEnvAgent": "runtime env agent",
    "ray::DashboardAgent": "dashboard agent",
    "log_monitor": "log monitor",
    "monitor.py": "monitor",
}


@dataclass(frozen=True)
class ProcessMemory:
    """One process.

    Attributes:
        part: a worker, router or controller by its name, or cli, store, ray, vllm.
        rss: resident bytes; pages shared with others count in each.
        pss: the same with a shared page split among its users; None where unreadable.
        idle_cpu: share of one core while no request ran.
    """

    part: str
    process: str
    pid: int
    rss: int
    pss: int | None
    idle_cpu: float


def part_of(command: list[str], log: str) -> tuple[str, str]:
    """The part and the process's role in it, from its command line and what its stdout is."""
    line = " ".join(command)
    title = command[0] if command else "?"
    for mark, role in _RAY.items():
        if mark in line:
            return "ray", role
    if any(Path(word).name == "pdserve" for word in command[:3]):
        return "cli", "pdserve up"
    if "valkey" in title:
        return "store", "valkey"
    file = Path(log)
    if file.suffix == ".log" and file.parent.name == "logs" and file.stem != "cli":
        return file.stem, _role(title, line)
    return ("ray", title) if title.startswith("ray::") else ("other", _role(title, line))


def _role(title: str, line: str) -> str:
    if "resource_tracker" in line:
        return "resource tracker"
    if "EngineCore" in line:
        return "engine core"
    if "VLLM::Worker" in line:
        return "engine worker"
    return "main" if title.startswith("ray::") else Path(title.split(" ")[0]).name


def tree(root: psutil.Process, skip: int, idle_seconds: float) -> list[ProcessMemory]:
    """`root` and everything below it, but for process `skip` and what is below that; 0 skips none.

    Takes `idle_seconds`, in which nothing should be asked.
    """
    processes = [root, *root.children(recursive=True)]
    if skip:
        with suppress(psutil.Error):
            gone = psutil.Process(skip)
            below = {gone.pid, *(p.pid for p in gone.children(recursive=True))}
            processes = [p for p in processes if p.pid not in below]
    before = {p.pid: _cpu(p) for p in processes}
    began = time.perf_counter()
    time.sleep(idle_seconds)
    rows = []
    for process in processes:
        with suppress(psutil.Error):
            busy = (_cpu(process) - before[process.pid]) / (time.perf_counter() - began)
            part, role = part_of(process.cmdline() or [process.name()], _stdout(process.pid))
            if process.pid == root.pid and part == "cli":
                role = "guardian"
            rss = process.memory_info().rss
            rows.append(ProcessMemory(part, role, process.pid, rss, _pss(process), busy))
    return sorted(rows, key=lambda row: (row.part, -row.rss))


def _cpu(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _pss(process: psutil.Process) -> int | None:
    with suppress(psutil.Error, AttributeError):
        return int(process.memory_full_info().pss)
    return None


def _stdout(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/1")
    return ""
