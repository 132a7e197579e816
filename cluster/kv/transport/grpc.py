"""Host-staged transfer over gRPC streams, one stream per handoff and route."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import torch

from cluster.kv.milestones import Milestones
from cluster.kv.paged import PagedCache
from cluster.kv.transport.allocator import keep_large_blocks
from cluster.kv.transport.frames import HEADER_BYTES
from cluster.kv.transport.grpc_streams import GrpcInbound, GrpcOutbound, StagedOutbound
from cluster.kv.transport.seam import Peer, Serve
from cluster.kv.transport.staging import Staging
from cluster.ports import ANY, take

SERVICE = "pdserve.v1.KvTransfer"
_FRAME_SLACK = 8192  # a ticket, or a header
_READ_CHUNK = 1 << 20
STAGED_FRAMES = 16
IDLE_SECONDS = 600.0
"""Channels to a peer that was not called for so long are closed when another peer comes."""
HANDSHAKE_SECONDS = 10.0
"""A connection that has not begun HTTP/2 by then is closed."""

Handler = Callable[[AsyncIterator[bytes], Any], Awaitable[None]]


@dataclass
class _Channels:
    """To one peer.

    Attributes:
        calls: under way.
        used_at: when the last call ended, CLOCK_MONOTONIC seconds.
    """

    all: list[grpc.aio.Channel]
    calls: int = 0
    used_at: float = 0.0

    def ended(self, _: object) -> None:
        self.calls -= 1
        self.used_at = time.monotonic()

    async def close(self) -> None:
        for channel in self.all:
            await channel.close()


class GrpcTransport:
    """One server, and a few channels per peer over which its pushes are dealt out.

    Args:
        host: the interface to bind to and to be reached at.
        max_message_bytes: largest frame payload.
        max_streams: pushes served at once; more wait at the peer.
        channels: connections per peer.
        cache: what is handed off; payloads of one on a device are staged for it.
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
        cache: PagedCache | None = None,
        further: Mapping[str, Handler] | None = None,
        ports: str = ANY,
    ) -> None:
        self._host = host
        self._ports = ports
        self.frame_bytes = max_message_bytes
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
        self._channels: dict[str, _Channels] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._turn = 0
        self._server: grpc.aio.Server | None = None
        self.milestones = Milestones("kv-copies", cache.device if cache else None)
        self._staging = None
        if cache is not None and cache.device.type == "cuda":
            self._mark = cache.mark
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
            return GrpcOutbound(call, self.frame_bytes)
        return StagedOutbound(call, self.frame_bytes, self._staging, self.milestones, self._mark)

    def call(self, address: str, method: str) -> Any:
        """A stream of raw messages to a peer, on the channel whose turn it is."""
        channels = self._channels.get(address)
        if channels is None:
            self._close_idle()
            options = [*self._options, ("grpc.use_local_subchannel_pool", 1)]
            channels = self._channels[address] = _Channels(
                [grpc.aio.insecure_channel(address, options=options) for _ in range(self._per_peer)]
            )
        self._turn += 1
        channel = channels.all[self._turn % len(channels.all)]
        call: Any = channel.stream_stream(f"/{SERVICE}/{method}")()
        channels.calls += 1
        call.add_done_callback(channels.ended)
        return call

    def _close_idle(self) -> None:
        """Peers come and go; each life has an address of its own."""
        before = time.monotonic() - IDLE_SECONDS
        for address, channels in list(self._channels.items()):
            if not channels.calls and channels.used_at < before:
                del self._channels[address]
                closing = asyncio.create_task(channels.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def stop(self) -> None:
        for channels in self._channels.values():
            await channels.close()
        if self._server is not None:
            await self._server.stop(grace=0)
