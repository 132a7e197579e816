"""Connections to one peer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable

from cluster.kv.transport.streams.connection import Connection
from cluster.kv.transport.streams.protocol import request
from cluster.kv.transport.streams.reading import Broken, Reader
from cluster.kv.transport.streams.server import tune
from cluster.kv.transport.streams.stream import Stream

CONNECT_SECONDS = 10.0
PUSHED_STREAMS = 100
"""None is taken; but h2 counts late frames of streams that have ended as of such ones."""


class Channel:
    """A connection to a peer, made when it is needed and made anew when it broke.

    Attributes:
        used_at: when a stream was last opened or ended, CLOCK_MONOTONIC seconds.
    """

    def __init__(self, address: str, reader: Callable[[Callable[[], None]], Reader]) -> None:
        self._address = address
        self._reader = reader
        self._connection: Connection | None = None
        self._making = asyncio.Lock()
        self._ended = asyncio.Event()
        self.used_at = time.monotonic()

    @property
    def streams(self) -> int:
        """Under way."""
        return len(self._connection.streams) if self._connection else 0

    async def open(self, path: str) -> Stream:
        """Waits while the peer takes no more streams.

        Raises:
            Broken: the peer cannot be reached.
        """
        while True:
            connection = await self._up()
            if connection.room:
                break
            self._ended.clear()
            await self._ended.wait()
        stream = connection.open(request(self._address, path))
        stream.when_ended(self._one_ended)
        self.used_at = time.monotonic()
        return stream

    def _one_ended(self) -> None:
        self.used_at = time.monotonic()
        self._ended.set()

    async def _up(self) -> Connection:
        async with self._making:
            if self._connection is None:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        host, _, port = self._address.rpartition(":")
        sock = connection = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
                family, _, _, _, address = found[0]
                sock = socket.socket(family, socket.SOCK_STREAM)
                sock.setblocking(False)
                tune(sock)
                await loop.sock_connect(sock, address)
                if sock.getsockname()[0] == sock.getpeername()[0]:
                    unpace(sock)
                connection = Connection(sock, self._reader, None, self._gone, PUSHED_STREAMS)
                connection.start()
                await asyncio.shield(connection.ready)
                return connection
        except BaseException as error:
            if connection is not None:
                connection.close("it did not come up")
            elif sock is not None:
                sock.close()
            if not isinstance(error, OSError | TimeoutError | Broken):
                raise
            raise Broken(f"{self._address}: {str(error) or 'no answer in time'}") from None

    def _gone(self, connection: Connection) -> None:
        if self._connection is connection:
            self._connection = None
        self._ended.set()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close("the worker stops")


def unpace(sock: socket.socket) -> None:
    """Within a host nothing can be congested. Where the host's default is BBR, it costs a third of
    the rate there: it paces what leaves by timers. Reno is in every kernel."""
    if option := getattr(socket, "TCP_CONGESTION", None):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, b"reno")
