"""Transfer over gRPC streams, one per handoff and route: between host memories from where the KV
lies to where it belongs, from and to devices through pinned memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import torch

from cluster.errors import HandoffRefused
from cluster.kv.milestones import Milestones
from cluster.kv.paged import PagedCache
from cluster.kv.transport.frames import CHECKSUM_BYTES, CONTROL_BYTES, HEADER_BYTES
from cluster.kv.transport.grpc_streams import (
    GrpcInbound,
    GrpcOutbound,
    StagedOutbound,
)
from cluster.kv.transport.seam import Peer, Serve
from cluster.kv.transport.staging import HostMemory, PinnedMemory, Staging
from cluster.kv.transport.streams.client import Channel
from cluster.kv.transport.streams.reading import Broken, Reader
from cluster.kv.transport.streams.server import Method, Server
from cluster.kv.transport.streams.stream import Stream
from cluster.ports import ANY, take

SERVICE = "pdserve.v1.KvTransfer"
STAGED_BYTES = 128 << 20
"""Pinned memory for payloads under way from or to a device, each way."""
WHOLE_BYTES = CONTROL_BYTES
"""Payloads of longer messages are read when it is known where they go."""
IDLE_SECONDS = 600.0
"""Channels to a peer that was not called for so long are closed when another peer comes."""
HANDSHAKE_SECONDS = 10.0
"""A connection that has not begun HTTP/2 by then is closed."""


class GrpcTransport:
    """One server, and a few channels per peer over which its pushes are dealt out.

    Args:
        host: the interface to bind to and to be reached at.
        max_message_bytes: largest frame payload.
        max_streams: pushes served at once, of a connection; more wait at the peer.
        channels: connections per peer.
        cache: what is handed off; payloads of one on a device are staged for it.
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
        ports: str = ANY,
    ) -> None:
        self._host = host
        self._ports = ports
        self.frame_bytes = max_message_bytes
        self._max_streams = max_streams
        self._per_peer = channels
        self._channels: dict[str, list[Channel]] = {}
        self._turn = 0
        self._server: Server | None = None
        self.milestones = Milestones("kv-copies", cache.device if cache else None)
        self._out: Staging | None = None
        self._in: HostMemory | PinnedMemory = HostMemory()
        if cache is not None and cache.device.type == "cuda":
            self._mark = cache.mark
            self._out = self._staging()
            self._in = PinnedMemory(self._staging(), self.milestones, cache.mark)

    def _staging(self) -> Staging:
        return Staging(torch.device("cpu"), STAGED_BYTES, self.frame_bytes)

    async def start(self, serve: Serve) -> str:
        """Raises ConfigError if the interface cannot be bound."""

        async def push(stream: Stream) -> None:
            await serve(self.inbound(stream))

        return self.listen({"Push": push})

    def inbound(self, stream: Stream) -> GrpcInbound:
        """A push that a peer has opened."""
        return GrpcInbound(stream, self.milestones, self._in)

    def listen(self, methods: Mapping[str, Method]) -> str:
        """Serves methods by name. Raises ConfigError if the interface cannot be bound."""
        self._server = Server(
            {f"/{SERVICE}/{name}": method for name, method in methods.items()},
            self._reader,
            self._max_streams,
            HANDSHAKE_SECONDS,
        )
        address = take(self._server.bind, self._host, self._ports, "handoff.host, handoff.ports")
        self._server.start()
        return address

    def _reader(self, go_on: Callable[[], None]) -> Reader:
        limit = self.frame_bytes + HEADER_BYTES + CHECKSUM_BYTES + CONTROL_BYTES
        return Reader(limit, WHOLE_BYTES, HEADER_BYTES, go_on)

    async def open(self, peer: Peer, handoff_id: str) -> GrpcOutbound:
        stream = await self.call(peer.address, "Push")
        if self._out is None:
            return GrpcOutbound(stream, self.frame_bytes)
        return StagedOutbound(stream, self.frame_bytes, self._out, self.milestones, self._mark)

    async def call(self, address: str, method: str) -> Stream:
        """A stream to a peer, on the channel whose turn it is.

        Raises:
            HandoffRefused: the peer cannot be reached.
        """
        channels = self._channels.get(address)
        if channels is None:
            self._close_idle()
            channels = [Channel(address, self._reader) for _ in range(self._per_peer)]
            self._channels[address] = channels
        self._turn += 1
        try:
            return await channels[self._turn % len(channels)].open(f"/{SERVICE}/{method}")
        except Broken as broken:
            raise HandoffRefused(f"the decode worker cannot be reached: {broken}") from None

    def _close_idle(self) -> None:
        """Peers come and go; each life has an address of its own."""
        before = time.monotonic() - IDLE_SECONDS
        for address, channels in list(self._channels.items()):
            if all(not channel.streams and channel.used_at < before for channel in channels):
                del self._channels[address]
                for channel in channels:
                    channel.close()

    async def stop(self) -> None:
        for channels in self._channels.values():
            for channel in channels:
                channel.close()
        if self._server is not None:
            await self._server.stop()
        await asyncio.sleep(0)  # what waited for a stream has heard of its end
