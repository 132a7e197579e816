"""A port that serves methods of streams."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping

from cluster.kv.transport.streams.connection import Connection
from cluster.kv.transport.streams.reading import Broken, Reader
from cluster.kv.transport.streams.stream import Stream

log = logging.getLogger(__name__)

BACKLOG = 4096
ACCEPTS_A_TURN = 64
PAUSE_SECONDS = 0.5
OK, UNIMPLEMENTED, INTERNAL = 0, 12, 13

Method = Callable[[Stream], Awaitable[None]]


class Server:
    """Serves streams by the path of their method.

    Args:
        reader: makes a stream's reader.
        max_streams: of a connection, at once.
        handshake_seconds: a connection that has not begun HTTP/2 by then is closed.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        reader: Callable[[Callable[[], None]], Reader],
        max_streams: int,
        handshake_seconds: float,
    ) -> None:
        self._methods = methods
        self._reader = reader
        self._max_streams = max_streams
        self._handshake_seconds = handshake_seconds
        self._socket: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def bind(self, host: str, port: int) -> int:
        """Takes a port, 0 for any. Raises OSError."""
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.bind(address)
            sock.listen(BACKLOG)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)
        self._socket = sock
        return int(sock.getsockname()[1])

    def start(self) -> None:
        """Begins to take connections."""
        assert self._socket is not None, "bind comes before start"
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        assert self._socket is not None
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                return self._pause(error)
            self._take(sock)

    def _pause(self, error: OSError) -> None:
        """Out of open files, most likely: those that wait are taken later."""
        log.warning("no connection can be taken: %s", errno.errorcode.get(error.errno or 0, error))
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)  # type: ignore[arg-type]
        loop.call_later(PAUSE_SECONDS, self._again)

    def _again(self) -> None:
        if self._socket is not None:
            self.start()

    def _take(self, sock: socket.socket) -> None:
        """Nothing is made for a connection before it says something: many say nothing."""
        sock.setblocking(False)
        tune(sock)
        loop = asyncio.get_running_loop()
        self._open.add(sock)
        timer = loop.call_later(self._handshake_seconds, self._drop, sock)

        def begin() -> None:
            if not _has_said(sock):
                timer.cancel()
                return self._drop(sock)
            loop.remove_reader(sock)
            self._open.discard(sock)
            connection = Connection(
                sock, self._reader, self._call, self._connections.discard, self._max_streams
            )
            self._connections.add(connection)
            connection.ready.add_done_callback(lambda _: timer.cancel())
            timer.cancel()
            late = loop.call_later(self._handshake_seconds, self._unready, connection)
            connection.ready.add_done_callback(lambda _: late.cancel())
            connection.start()

        loop.add_reader(sock, begin)

    def _drop(self, sock: socket.socket) -> None:
        """One that has said nothing."""
        if sock in self._open:
            asyncio.get_running_loop().remove_reader(sock)
            self._open.discard(sock)
            sock.close()

    def _unready(self, connection: Connection) -> None:
        if not connection.ready.done():
            connection.close("no HTTP/2 was begun")

    def _call(self, stream: Stream, path: str) -> None:
        method = self._methods.get(path)
        if method is None:
            return stream.finish(UNIMPLEMENTED, "no such method")
        task = asyncio.create_task(self._run(method, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, method: Method, stream: Stream) -> None:
        try:
            stream.begin()
            await method(stream)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except Broken:
            stream.cancel()  # the peer has gone, or will not hear of it
        except Exception:
            log.exception("a stream's method failed")
            stream.finish(INTERNAL, "the method failed")
        else:
            stream.finish(OK)

    async def stop(self) -> None:
        """Closes the port and every connection; methods under way are cancelled."""
        loop = asyncio.get_running_loop()
        if self._socket is not None:
            loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        for sock in list(self._open):
            self._drop(sock)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(self._connections):
            connection.close("the worker stops")


def _has_said(sock: socket.socket) -> bool:
    """A socket that can be read has bytes for us, and not its end."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True  # woken for nothing: whoever reads it will see
    except OSError:
        return False


def tune(sock: socket.socket) -> None:
    """A payload waits for nothing; a peer whose host is gone is noticed within half a minute."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 20),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 2),
        ("TCP_USER_TIMEOUT", 30_000),
    ):
        if option := getattr(socket, name, None):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
