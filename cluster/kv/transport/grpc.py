"""Host-staged transfer over gRPC streams, one stream per handoff and route."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import numpy as np
import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.milestones import Fence, Milestones
from cluster.kv.transport.allocator import keep_large_blocks
from cluster.kv.transport.checksums import host_checksum
from cluster.kv.transport.frames import (
    HEADER_BYTES,
    Abort,
    Blocks,
    BlocksWire,
    Commit,
    Frame,
    Open,
    Reply,
    decode_frame,
    decode_reply,
    encode_frame,
    encode_reply,
)
from cluster.kv.transport.seam import Buffer, Peer, Serve
from cluster.kv.transport.staging import Slot, Staging
from cluster.ports import ANY, take

log = logging.getLogger(__name__)

SERVICE = "pdserve.v1.KvTransfer"
_FRAME_SLACK = 8192  # a ticket, or a header
_READ_CHUNK = 1 << 20
STAGED_FRAMES = 16
HANDSHAKE_SECONDS = 10.0
"""A connection that has not begun HTTP/2 by then is closed."""

Handler = Callable[[AsyncIterator[bytes], Any], Awaitable[None]]


class GrpcOutbound:
    """A push whose payloads come with the frames."""

    transport = "grpc"
    link = 0
    stream = None

    def __init__(self, call: Any, frame_bytes: int) -> None:
        self._call = call
        self.frame_bytes = frame_bytes

    async def buffer(self, size: int) -> Buffer:
        return BlocksWire(size)

    async def send_blocks(
        self, run: BlockRun, buffer: Buffer, seed: int, filled: Fence | None
    ) -> None:
        assert isinstance(buffer, BlocksWire) and filled is None
        checksum = host_checksum(buffer.payload, seed)
        await self._write(buffer.seal(replace(run, checksum=checksum)))

    async def flush(self) -> int:
        return 0

    def discard(self, buffer: Buffer) -> None:
        """Nothing: the buffer is its own memory."""

    async def send(self, frame: Open | Commit | Abort) -> None:
        await self._write(encode_frame(frame))

    async def _write(self, wire: bytes) -> None:
        try:
            await self._call.write(wire)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise HandoffRefused(why(error)) from error

    async def receive(self) -> Reply:
        try:
            wire = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise HandoffRefused(why(error)) from error
        if wire is grpc.aio.EOF:
            raise HandoffRefused("the decode worker closed the transfer")
        return decode_reply(wire)

    def cancel(self) -> None:
        self._call.cancel()


class StagedOutbound(GrpcOutbound):
    """The same from a device: payloads are copied into pinned memory, and from there into frames
    while the next ones are copied.

    Args:
        milestones: of the stream on which the copies are queued.
    """

    def __init__(
        self, call: Any, frame_bytes: int, staging: Staging, milestones: Milestones
    ) -> None:
        super().__init__(call, frame_bytes)
        self._staging = staging
        self._milestones = milestones
        self._last: asyncio.Task[None] | None = None

    async def buffer(self, size: int) -> Buffer:
        return await self._staging.take(size)

    async def send_blocks(
        self, run: BlockRun, buffer: Buffer, seed: int, filled: Fence | None
    ) -> None:
        assert isinstance(buffer, Slot)
        if self._last is not None and self._last.done():
            self._last.result()
        self._last = asyncio.create_task(self._send(run, buffer, seed, filled, self._last))
        self._last.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _send(
        self,
        run: BlockRun,
        slot: Slot,
        seed: int,
        filled: Fence | None,
        before: asyncio.Task[None] | None,
    ) -> None:
        wire = BlocksWire(slot.payload.numel())
        try:
            await self._milestones.reached(filled)
            np.copyto(wire.payload.numpy(), slot.payload.numpy())  # torch would wake its threads
        finally:
            self._give_back(slot, filled)
        sealed = wire.seal(replace(run, checksum=host_checksum(wire.payload, seed)))
        if before is not None:
            await before
        await self._write(sealed)

    def _give_back(self, slot: Slot, filled: Fence | None) -> None:
        self._milestones.then(filled, lambda _: self._staging.give_back(slot))

    async def flush(self) -> int:
        if self._last is not None:
            await self._last
        return 0

    def discard(self, buffer: Buffer) -> None:
        assert isinstance(buffer, Slot)
        self._staging.give_back(buffer)

    def cancel(self) -> None:
        super().cancel()
        if self._last is not None:
            self._last.cancel()


class GrpcInbound:
    """A push whose payloads come with the frames.

    Args:
        milestones: of the stream on which payloads are written into the cache.
    """

    transport = "grpc"
    stream = None

    def __init__(self, frames: AsyncIterator[bytes], context: Any, milestones: Milestones) -> None:
        self._frames = frames
        self._context = context
        self._milestones = milestones

    async def receive(self) -> Frame | None:
        try:
            return decode_frame(await anext(self._frames))
        except (StopAsyncIteration, grpc.aio.AioRpcError, grpc.RpcError):
            return None

    def claim(self, handoff_id: str) -> None:
        """Nothing: the payloads of this push come with its frames."""

    def verify(self, blocks: Blocks, seed: int) -> None:
        if host_checksum(blocks.payload, seed) != blocks.run.checksum:
            raise HandoffRefused(f"frame {blocks.run.sequence}: checksum differs")

    async def reached(self, fence: Fence | None) -> None:
        await self._milestones.reached(fence)

    async def judge(self, commit: Commit) -> None:
        if commit.checksum:
            raise HandoffRefused("a checksum of payloads that did not come over a link")

    def done(self, blocks: Blocks) -> None:
        """Nothing: the payload is the message's own memory."""

    async def send(self, reply: Reply) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.RpcError, asyncio.InvalidStateError):
            await self._context.write(encode_reply(reply))  # a peer that is gone needs no reply

    def close(self) -> None:
        """Nothing: the stream ends with its handler."""


class GrpcTransport:
    """One server, and a few channels per peer over which its pushes are dealt out.

    Args:
        host: the interface to bind to and to be reached at.
        max_message_bytes: largest frame payload.
        max_streams: pushes served at once; more wait at the peer.
        channels: connections per peer.
        device: of the KV cache.
        further: handlers of further methods of the service, by name.
        ports: to take one of.
    """

    name = "grpc"

    def __init__(
        self,
        host: str,
        max_message_bytes: int,
        max_streams: int,
        channels: int = 2,
        device: torch.device | None = None,
        further: Mapping[str, Handler] | None = None,
        ports: str = ANY,
    ) -> None:
        self._host = host
        self._ports = ports
        self._frame_bytes = max_message_bytes
        self._further = dict(further or {})
        limit = max_message_bytes + HEADER_BYTES + _FRAME_SLACK
        self._options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # A payload crosses in one HTTP/2 frame and few reads; the defaults are 16 and 8 KiB.
            ("grpc.http2.max_frame_size", (1 << 24) - 1),
            ("grpc.http2.lookahead_bytes", 1 << 24),
            ("grpc.experimental.tcp_min_read_chunk_size", _READ_CHUNK),
            ("grpc.experimental.tcp_read_chunk_size", _READ_CHUNK),
        ]
        self._server_options = [
            *self._options,
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", max_streams),
            ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ]
        self._per_peer = channels
        self._channels: dict[str, list[grpc.aio.Channel]] = {}
        self._turn = 0
        self._server: grpc.aio.Server | None = None
        self.milestones = Milestones("kv-copies")
        self._staging = None
        if device is not None and device.type == "cuda":
            size = STAGED_FRAMES * max_message_bytes
            self._staging = Staging(torch.device("cpu"), size, max_message_bytes)

    async def start(self, serve: Serve) -> str:
        """Raises ConfigError if the interface cannot be bound."""

        async def push(frames: AsyncIterator[bytes], context: Any) -> None:
            await serve(GrpcInbound(aiter(frames), context, self.milestones))

        return await self.listen({"Push": push})

    async def listen(self, handlers: Mapping[str, Handler]) -> str:
        """Serves streams of raw messages by method name."""
        keep_large_blocks()
        handler = grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.stream_stream_rpc_method_handler(method)
                for name, method in {**handlers, **self._further}.items()
            },
        )
        self._server = grpc.aio.server(options=self._server_options)
        self._server.add_generic_rpc_handlers((handler,))
        bind = self._server.add_insecure_port
        address = take(
            lambda host, port: bind(f"{host}:{port}"),
            self._host,
            self._ports,
            "handoff.host, handoff.ports",
        )
        await self._server.start()
        return address

    async def open(self, peer: Peer, handoff_id: str) -> GrpcOutbound:
        call = self.call(peer.address, "Push")
        if self._staging is None:
            return GrpcOutbound(call, self._frame_bytes)
        return StagedOutbound(call, self._frame_bytes, self._staging, self.milestones)

    def call(self, address: str, method: str) -> Any:
        """A stream of raw messages to a peer, on the channel whose turn it is."""
        channels = self._channels.get(address)
        if channels is None:
            channels = self._channels[address] = [
                grpc.aio.insecure_channel(
                    address, options=[*self._options, ("grpc.use_local_subchannel_pool", 1)]
                )
                for _ in range(self._per_peer)
            ]
        self._turn += 1
        channel = channels[self._turn % len(channels)]
        return channel.stream_stream(f"/{SERVICE}/{method}")()

    async def stop(self) -> None:
        for channels in self._channels.values():
            for channel in channels:
                await channel.close()
        if self._server is not None:
            await self._server.stop(grace=0)


def why(error: BaseException) -> str:
    """What a broken stream means."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return "the decode worker closed the transfer"
    log.warning("push failed: %s: %s", error.code().name, error.details())
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return "the decode worker cannot be reached"
    return f"the decode worker broke the transfer off ({error.code().name})"
