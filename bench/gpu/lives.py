"""A store, two workers and a router as plain processes, for a machine without Ray.

Ray would place the same bodies, and restart them; it carries nothing of a request.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.fleet import surroundings
from bench.gpu.life import Asked
from cluster.store.embedded import EmbeddedStore

STOP_SECONDS = 15.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Life:
    name: str
    process: subprocess.Popen[str]
    ready: Path


class Lives:
    """Start it once, stop it always.

    Args:
        config: the cluster's file.
        roles: by worker's name.
        cards: by worker's name; none for one on the CPU.
        folder: takes the store, compile caches and what the lives say of themselves.
        logs: of each life, by its name.
    """

    def __init__(
        self,
        config: Path,
        roles: Mapping[str, str],
        cards: Mapping[str, tuple[int, ...]],
        folder: Path,
        logs: Path,
    ) -> None:
        self._config = config
        self._roles = {**roles, "router-0": "router"}
        self._cards = cards
        self._folder = folder
        self._logs = logs
        self._store: EmbeddedStore | None = None
        self._lives: list[_Life] = []
        self.grpc_address = ""

    def start(self, limit: float) -> None:
        """Returns when it serves. Raises RuntimeError with a life's last lines if it does not."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._store = EmbeddedStore.start(self._folder)
        secret = secrets.token_hex(32)
        ends = time.monotonic() + limit
        for name, role in self._roles.items():
            self._lives.append(self._begin(name, role, secret, self._store.url, limit))
        while not all(life.ready.exists() for life in self._lives):
            for life in self._lives:
                if life.process.poll() is not None or time.monotonic() > ends:
                    log = (self._logs / f"{life.name}.log").read_text(errors="replace")
                    last = "\n".join(log.splitlines()[-20:])
                    raise RuntimeError(f"{life.name} is not ready:\n{last}")
            time.sleep(POLL_SECONDS)
        self.grpc_address = self._lives[-1].ready.read_text()

    def stop(self) -> None:
        """Ends every life and what it started."""
        for life in reversed(self._lives):
            assert life.process.stdin is not None
            with suppress(BrokenPipeError):
                life.process.stdin.close()
        for life in self._lives:
            with suppress(subprocess.TimeoutExpired):
                life.process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(life.process.pid, signal.SIGKILL)
            life.process.wait()
        if self._store is not None:
            self._store.stop()

    def _begin(self, name: str, role: str, secret: str, store_url: str, limit: float) -> _Life:
        ready = self._folder / f"{name}.ready"
        asked = Asked(name, role, str(self._config), secret, store_url, str(ready), limit)
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.life"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=os.environ | surroundings(self._cards.get(name, ()), self._folder / name),
                start_new_session=True,
            )
        assert process.stdin is not None
        process.stdin.write(asked.to_line())
        process.stdin.flush()
        return _Life(name, process, ready)
