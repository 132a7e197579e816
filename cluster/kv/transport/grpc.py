"""Host-staged transfer over gRPC streams, one stream per handoff and rank."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from cluster.errors import ConfigError, HandoffRefused
from cluster.kv.transport.frames import (
    HEADER_BYTES,
    Frame,
    Reply,
    decode_frame,
    decode_reply,
    encode_frame,
    encode_reply,
)
from cluster.kv.transport.seam import Outbound, Serve

log = logging.getLogger(__name__)

_METHOD = "/pdserve.v1.KvTransfer/Push"
_FRAME_SLACK = 8192  # a ticket, or a header


class _GrpcOutbound:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def send(self, frame: Frame) -> None:
        try:
            await self._call.write(encode_frame(frame))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise HandoffRefused(_why(error)) from error

    async def receive(self) -> Reply:
        try:
            wire = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise HandoffRefused(_why(error)) from error
        if wire is grpc.aio.EOF:
            raise HandoffRefused("the decode worker closed the transfer")
        return decode_reply(wire)

    def cancel(self) -> None:
        self._call.cancel()


class _GrpcInbound:
    def __init__(self, frames: AsyncIterator[bytes], context: Any) -> None:
        self._frames = frames
        self._context = context

    async def receive(self) -> Frame | None:
        try:
            return decode_frame(await anext(self._frames))
        except (StopAsyncIteration, grpc.aio.AioRpcError, grpc.RpcError):
            return None

    async def send(self, reply: Reply) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.RpcError, asyncio.InvalidStateError):
            await self._context.write(encode_reply(reply))  # a peer that is gone needs no reply


class GrpcTransport:
    """One server and one channel per peer.

    Args:
        host: the interface to bind to and to be reached at.
        max_message_bytes: largest frame payload.
        max_streams: pushes served at once; more wait at the peer.
    """

    name = "grpc"

    def __init__(self, host: str, max_message_bytes: int, max_streams: int) -> None:
        self._host = host
        limit = max_message_bytes + HEADER_BYTES + _FRAME_SLACK
        self._options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_frame_size", 1 << 20),
        ]
        self._server_options = [
            *self._options,
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", max_streams),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ]
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._server: grpc.aio.Server | None = None

    async def start(self, serve: Serve) -> str:
        """Raises ConfigError if the interface cannot be bound."""

        async def push(frames: AsyncIterator[bytes], context: Any) -> None:
            await serve(_GrpcInbound(aiter(frames), context))

        handler = grpc.method_handlers_generic_handler(
            "pdserve.v1.KvTransfer", {"Push": grpc.stream_stream_rpc_method_handler(push)}
        )
        self._server = grpc.aio.server(options=self._server_options)
        self._server.add_generic_rpc_handlers((handler,))
        bound = _bracketed(self._host)
        try:
            port = self._server.add_insecure_port(f"{bound}:0")
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigError(f"handoff.host: cannot listen on interface {self._host}")
        await self._server.start()
        return f"{bound}:{port}"

    async def open(self, address: str) -> Outbound:
        channel = self._channels.get(address)
        if channel is None:
            channel = grpc.aio.insecure_channel(address, options=self._options)
            self._channels[address] = channel
        return _GrpcOutbound(channel.stream_stream(_METHOD)())

    async def stop(self) -> None:
        for channel in self._channels.values():
            await channel.close()
        if self._server is not None:
            await self._server.stop(grace=0)


def _why(error: BaseException) -> str:
    if not isinstance(error, grpc.aio.AioRpcError):
        return "the decode worker closed the transfer"
    log.warning("push failed: %s: %s", error.code().name, error.details())
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return "the decode worker cannot be reached"
    return f"the decode worker broke the transfer off ({error.code().name})"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
