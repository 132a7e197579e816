"""`pdserve up` as a subprocess: started, timed part by part, and ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.cli.rundir import RunDir

PDSERVE = Path(sys.executable).parent / "pdserve"
STOP_SECONDS = 120.0
_LINE = re.compile(r"\s*(?P<own>[\d.]+) s  (?P<part>[\w.-]+): (?P<state>\w+)")


@dataclass(frozen=True)
class PartReady:
    """A part of the cluster became ready.

    Attributes:
        own_seconds: since the part itself began.
        after_seconds: since `pdserve up` was called.
    """

    part: str
    own_seconds: float
    after_seconds: float


def part_ready(line: str, after: float) -> PartReady | None:
    """What a progress line of `pdserve up` says, if it says that a part is ready."""
    found = _LINE.match(line)
    if found is None or found["state"] != "ready":
        return None
    return PartReady(found["part"], float(found["own"]), after)


class Up:
    """`pdserve up`. Start it once, stop it always.

    Attributes:
        first_line_seconds: until it said anything: Python and the imports of the CLI.
        parts: in the order in which they became ready.
    """

    def __init__(self, name: str, file: Path | None, folder: Path) -> None:
        self._command = [str(PDSERVE), "up", "--grpc-port", "0", "--http-port", "0"]
        if file is not None:
            self._command += ["-f", str(file)]
        self._folder = folder
        self._name = name
        self._lines: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self.first_line_seconds = 0.0
        self.ready_seconds = 0.0
        self.grpc_address = ""
        self.parts: list[PartReady] = []

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, limit: float) -> None:
        """Returns when it is ready. Raises RuntimeError with its last lines if it is not."""
        os.environ["PDSERVE_RUNTIME_DIR"] = str(self._folder)  # RunDir below reads it as well
        began = time.perf_counter()
        self._process = subprocess.Popen(
            self._command,
            env={**os.environ, "COLUMNS": "400"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(began,), daemon=True)
        self._reader.start()
        while (after := time.perf_counter() - began) < limit:
            if self._process.poll() is not None:
                break
            state = RunDir(self._name).read()
            if state is not None and state.state == "ready":
                self.ready_seconds = after
                self.grpc_address = state.grpc_address
                return
            time.sleep(0.05)
        last = "\n".join(self._lines[-12:])
        raise RuntimeError(f"`pdserve up` is not ready after {after:.0f} s:\n{last}")

    def stop(self) -> float:
        """Ends it; the seconds that took."""
        began = time.perf_counter()
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()  # its child then stops the rest
            if self._reader is not None:
                self._reader.join(5)
        return time.perf_counter() - began

    def _read(self, began: float) -> None:
        assert self._process is not None and self._process.stderr is not None
        for line in self._process.stderr:
            after = time.perf_counter() - began
            self.first_line_seconds = self.first_line_seconds or after
            self._lines.append(line.rstrip())
            ready = part_ready(line, after)
            if ready is not None:
                self.parts.append(ready)
