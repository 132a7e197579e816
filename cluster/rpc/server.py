"""The server: one port, its methods, and an end that lets calls finish."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from cluster.rpc.connection import Connection
from cluster.rpc.limits import Limits

BACKLOG = 4096


class RpcServer:
    """Serves what generated `add_…Servicer_to_server` functions register.

    Args:
        names: of a verified client certificate, from what TLS tells of it.
    """

    def __init__(
        self, limits: Limits, names: Callable[[Mapping[str, Any]], tuple[str, ...]]
    ) -> None:
        self._limits = limits
        self._names = names
        self._methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._connections: set[Connection] = set()
        self._socket: socket.socket | None = None
        self._tls: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._closed = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Called by generated code, which registers the same methods by name as well."""

    def add_registered_method_handlers(
        self, service: str, methods: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        self._methods |= {f"/{service}/{name}": method for name, method in methods.items()}

    def bind(self, host: str, port: int, tls: ssl.SSLContext | None) -> int:
        """Takes the port, 0 for any; `start` serves it. Raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Named as TCP: of others asyncio leaves Nagle's algorithm on, and a token waits up to 40 ms
        # for the acknowledgement of the one before. uvloop turns it off in any case.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(BACKLOG)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._tls = tls
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        if self._socket is None:
            raise RuntimeError("bind comes before start")
        self._server = await asyncio.get_running_loop().create_server(
            self._connection, sock=self._socket, ssl=self._tls, backlog=BACKLOG
        )

    async def stop(self, grace_seconds: float) -> None:
        """Takes no more calls; those that run may end until the grace is over."""
        if self._server is None:
            if self._socket is not None:
                self._socket.close()
            return
        self._server.close()
        for connection in list(self._connections):
            connection.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none_left(), grace_seconds)
        cancelled = [
            task
            for connection in self._connections
            for call in list(connection.calls.values())
            if (task := call.give_up(grpc.StatusCode.UNAVAILABLE, "the server is shutting down"))
        ]
        if cancelled:
            await asyncio.wait(cancelled, timeout=grace_seconds)
        await asyncio.sleep(0)  # what they have said leaves at the end of a turn of the loop
        for connection in list(self._connections):
            connection.abort()

    async def _none_left(self) -> None:
        while self._connections:
            self._closed.clear()
            await self._closed.wait()

    def _connection(self) -> Connection:
        return Connection(
            self._methods, self._limits, self._names, self._connections.add, self._gone
        )

    def _gone(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._closed.set()
