"""Processes of a run: each says `ready` and where it is, and ends with its stdin."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import psutil

from cluster.obs.garbage import keep_what_is_loaded

Body = Callable[[dict[str, Any]], Awaitable[tuple[dict[str, Any], object]]]
"""From a process's arguments to what it says, and what must live as long as it."""


class Process:
    """A module of bench.streams in a process of its own, on given cores."""

    def __init__(self, module: str, cores: set[int], **arguments: Any) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", f"bench.streams.{module}", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        assert self._child.stdout is not None
        while not (line := self._child.stdout.readline()).startswith("ready "):
            if not line:
                raise RuntimeError(f"{module} did not start")
        self.said: dict[str, Any] = json.loads(line.removeprefix("ready "))
        self._watched = [psutil.Process(pid) for pid in self.said.get("pids", [self._child.pid])]

    def cpu_seconds(self) -> float:
        """User and system time of the processes that serve."""
        return sum(sum(p.cpu_times()[:2]) for p in self._watched)

    def resident_bytes(self) -> int:
        return sum(int(p.memory_info().rss) for p in self._watched)

    def stop(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(body: Body, uvloop: bool = True) -> None:
    """Runs `body` with this process's arguments, says what it returns, waits for the end."""

    async def main() -> None:
        said, _kept = await body(json.loads(sys.argv[1]))
        keep_what_is_loaded()  # As pdserve's own processes do.
        print("ready " + json.dumps(said), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        os._exit(0)  # nothing here is worth an orderly end

    if uvloop:
        import uvloop as loops

        loops.run(main())
    else:
        asyncio.run(main())
