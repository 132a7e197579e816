"""A store that is another than it was: it says what a real one does, but for TIME and version."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit

_TIME = re.compile(rb"^\*2\r\n\$10\r\n(\d{10})\r\n(\$\d+\r\n\d+\r\n)$")


class OtherStore:
    """Attributes:
    url: of it.
    """

    def __init__(self, url: str, host: str, seconds: float = 0.0, version: str = "") -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._to = (parts.hostname, parts.port)
        self._seconds, self._version = round(seconds), version.encode()
        self._listener = socket.create_server((host, 0))
        port = self._listener.getsockname()[1]
        self.url = f"redis://:{parts.password}@{host}:{port}{parts.path}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections; those that are open end with their clients."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                store = socket.create_connection(self._to)
                for ends in ((client, store, False), (store, client, True)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, to: socket.socket, answers: bool) -> None:
        with suppress(OSError), source, to:
            while data := source.recv(1 << 16):
                if answers and (told := _TIME.match(data)):
                    seconds = b"%d" % (int(told[1]) + self._seconds)
                    data = b"*2\r\n$10\r\n" + seconds + b"\r\n" + told[2]
                if answers and self._version and b"_version:" in data:
                    data = _with_version(data, self._version)
                to.sendall(data)
            to.shutdown(socket.SHUT_RDWR)


def _with_version(info: bytes, version: bytes) -> bytes:
    """INFO's answer, a bulk string, of a server of another version."""
    body = info.partition(b"\r\n")[2].removesuffix(b"\r\n")
    body = re.sub(rb"valkey_version:[^\r]*\r\n", b"", body)
    body = re.sub(rb"redis_version:[^\r]*", b"redis_version:" + version, body)
    return b"$%d\r\n%s\r\n" % (len(body), body)


def ahead_of(url: str, host: str, seconds: float) -> OtherStore:
    """The store at `url`, so many seconds ahead, on the address `host` of this machine."""
    return OtherStore(url, host, seconds)
