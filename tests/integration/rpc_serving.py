"""A gRPC server of the router's kind with methods to try it on, and a client below gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ResponseReceived

from cluster.rpc.call import Call
from cluster.rpc.limits import Limits
from cluster.rpc.server import RpcServer

LIMITS = Limits(1 << 20, 100, keepalive_seconds=60)
WAIT = 60.0


class Methods:
    """Of a service `t.T`, on bytes."""

    def __init__(self) -> None:
        self.slow_ones = asyncio.Semaphore(0)  # calls of `slow` that have begun
        self.cancelled = asyncio.Event()
        self.sent = 0

    async def echo(self, request: bytes, call: Call) -> bytes:
        return request

    async def slow(self, request: bytes, call: Call) -> bytes:
        self.slow_ones.release()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return b""

    async def broken(self, request: bytes, call: Call) -> bytes:
        raise RuntimeError("the secret of the house")

    async def flood(self, request: bytes, call: Call) -> None:
        try:
            for _ in range(1000):
                await call.write(b"x" * 10_000)
                self.sent += 1
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def each(self, requests: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def count(self, requests: AsyncIterator[bytes], call: Call) -> bytes:
        return str(sum([len(r) async for r in requests])).encode()


@contextlib.asynccontextmanager
async def serving(
    limits: Limits = LIMITS, tls: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Methods, RpcServer, str]]:
    methods, server = Methods(), RpcServer(limits, lambda _: ())
    handlers: dict[str, Any] = {
        "echo": grpc.unary_unary_rpc_method_handler(methods.echo, bytes, bytes),
        "slow": grpc.unary_unary_rpc_method_handler(methods.slow, bytes, bytes),
        "broken": grpc.unary_unary_rpc_method_handler(methods.broken, bytes, bytes),
        "flood": grpc.unary_stream_rpc_method_handler(methods.flood, bytes, bytes),
        "each": grpc.stream_stream_rpc_method_handler(methods.each, bytes, bytes),
        "count": grpc.stream_unary_rpc_method_handler(methods.count, bytes, bytes),
    }
    server.add_registered_method_handlers("t.T", handlers)
    port = server.bind("127.0.0.1", 0, tls)
    await server.start()
    try:
        yield methods, server, f"127.0.0.1:{port}"
    finally:
        await server.stop(0.1)


@contextlib.asynccontextmanager
async def channel(
    address: str, tls: grpc.ChannelCredentials | None = None
) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with (
        grpc.aio.secure_channel(address, tls, options)
        if tls is not None
        else grpc.aio.insecure_channel(address, options)
    ) as opened:
        yield opened


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def framed(message: bytes, packed: int = 0) -> bytes:
    """As gRPC puts a message into DATA."""
    return struct.pack(">BI", packed, len(message)) + message


class Raw:
    """A client below gRPC."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self._events: deque[Any] = deque()

    @classmethod
    async def connect(cls, address: str) -> Raw:
        host, port = address.rsplit(":", 1)
        return cls(*await asyncio.open_connection(host, int(port)))

    def open(
        self,
        path: str = "/t.T/echo",
        content_type: str = "application/grpc",
        more: Sequence[tuple[str, str]] = (),
    ) -> int:
        """The headers of a call; `more` behind them."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(
            stream,
            [
                (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"),
                ("content-type", content_type), ("te", "trailers"), *more,
            ],
        )  # fmt: skip
        return stream

    def send(self, more: bytes = b"") -> None:
        """What h2 has to say, and `more` behind it, in one segment if it fits."""
        self.writer.write(self.h2.data_to_send() + more)

    async def until(self, kind: type[Any]) -> Any:
        """The next event of that kind; None at the end of the connection."""
        async with asyncio.timeout(WAIT):
            while True:
                while self._events:
                    if isinstance(event := self._events.popleft(), kind):
                        return event
                self.writer.write(self.h2.data_to_send())
                data = await self.reader.read(65_536)
                if not data:
                    return None
                self._events += self.h2.receive_data(data)

    async def answer(self) -> dict[str, str]:
        """The headers of the next answer."""
        return dict((await self.until(ResponseReceived)).headers)
