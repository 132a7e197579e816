"""The runtime directory: one folder per cluster name, for its owner only.

<root>/<name>/state.json   pid, addresses, state          0600
              config.json  what it was configured with    0600
              store_url    with the password              0600
              operator     the token of the Operator API  0600
              lock         held as long as a cluster of the name lives
              logs/        one file per worker, router, controller and for the CLI itself
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.config_changes import Flat
from cluster.errors import ConfigError, Unavailable

MAILBOXES = ("reload.request", "reload.reply")
"""What `pdserve reload` and `pdserve up` write for each other."""


@dataclass(frozen=True)
class RunState:
    """A running cluster, as other commands find it.

    Attributes:
        pid: of its outermost process; gone when everything is.
        pid_started: that process's start time, against a reused pid.
        state: starting, ready or stopping.
    """

    name: str
    pid: int
    pid_started: float
    state: str
    grpc_address: str = ""
    http_address: str = ""
    operator_address: str = ""

    def process(self) -> psutil.Process | None:
        """The process, if it still is the same one."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.pid_started) < 0.05
            if same and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


class RunDir:
    """The directory of one cluster name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = root() / name
        self._lock: int | None = None

    @property
    def logs(self) -> Path:
        """Where the parts write their output."""
        return self.path / "logs"

    def acquire(self) -> None:
        """Makes the directory and takes the name for the life of this process and its forks.

        Raises:
            ConfigError: the directory cannot be made, or a cluster of the name already runs.
        """
        try:
            # The root may be there for others too, such as /tmp: it stays as it is.
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (self.path, self.logs):
                path.mkdir(mode=0o700, exist_ok=True)
                path.chmod(0o700)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: cannot be used as runtime directory: {error.strerror}; "
                "set PDSERVE_RUNTIME_DIR to one of your own"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(
                f"a cluster called {self.name!r} already runs here: `pdserve down --name "
                f"{self.name}` ends it, or choose another `name`"
            ) from None
        self._lock = lock
        for log in self.logs.glob("*.log"):
            log.replace(log.with_suffix(".log.old"))

    def write(self, state: RunState) -> None:
        """Replaces the state at once."""
        write_private(self.path / "state.json", json.dumps(asdict(state)))

    def write_config(self, flat: Flat) -> None:
        """Keeps the configuration that runs; of secrets only digests."""
        write_private(self.path / "config.json", json.dumps(flat))

    def read_config(self) -> Flat:
        """The configuration that runs. Raises Unavailable if none does."""
        try:
            flat: Flat = json.loads((self.path / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise Unavailable(f"no cluster called {self.name!r} runs here") from error
        return flat

    def write_store_url(self, url: str) -> None:
        """Keeps the store's URL where only the owner reads it."""
        write_private(self.path / "store_url", url)

    def write_operator_token(self, token: str) -> None:
        """Keeps what opens the Operator API where only the owner reads it."""
        write_private(self.path / "operator", token)

    def operator_token(self) -> str:
        """Empty if there is none."""
        with suppress(OSError):
            return (self.path / "operator").read_text()
        return ""

    def read(self) -> RunState | None:
        """The state of the cluster that runs, or None; a dead one's leftovers do not count."""
        try:
            state = RunState(**json.loads((self.path / "state.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return state if state.process() is not None else None

    def clear(self) -> None:
        """Removes what points at a running cluster; the logs stay."""
        for name in ("state.json", "config.json", "store_url", "operator", "ray_token", *MAILBOXES):
            (self.path / name).unlink(missing_ok=True)


def root() -> Path:
    """`$PDSERVE_RUNTIME_DIR`, `$XDG_RUNTIME_DIR/pdserve` or `~/.pdserve`."""
    if own := os.environ.get("PDSERVE_RUNTIME_DIR"):
        return Path(own).absolute()
    if xdg := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(xdg) / "pdserve"
    return Path.home() / ".pdserve"


def running() -> list[RunState]:
    """Every cluster of this user that runs."""
    with suppress(OSError):
        found = (RunDir(path.name).read() for path in sorted(root().iterdir()) if path.is_dir())
        return [state for state in found if state is not None]
    return []


def find(name: str | None) -> RunState:
    """The cluster called `name`, or the only one.

    Raises:
        Unavailable: there is none, or several and no name.
    """
    if name is not None:
        state = RunDir(name).read()
        if state is None:
            raise Unavailable(f"no cluster called {name!r} runs here: start one with `pdserve up`")
        return state
    states = running()
    if len(states) == 1:
        return states[0]
    if not states:
        raise Unavailable("no cluster runs here: start one with `pdserve up`")
    names = ", ".join(state.name for state in states)
    raise Unavailable(f"several clusters run here ({names}): choose one with --name")


def wait_gone(state: RunState, seconds: float) -> bool:
    """Waits for the cluster's process to end; True if it did."""
    deadline = time.monotonic() + seconds
    while state.process() is not None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def write_private(path: Path, text: str) -> None:
    """Replaces the file at once; only its owner reads it.

    Raises:
        Unavailable: it cannot be written, as on a full disk; what was there stays.
    """
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        new.replace(path)
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}") from error
