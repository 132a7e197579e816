"""Channels to peers that have gone are not kept for ever."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import HandoffRefused
from cluster.kv.transport import grpc as transport
from cluster.kv.transport.grpc import GrpcTransport
from cluster.kv.transport.streams.stream import Stream


async def test_idle_channels_are_closed_when_another_peer_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.0)

    async def push(stream: Stream) -> None:
        await stream.receive()

    peers = [GrpcTransport("127.0.0.1", 1 << 20, 4) for _ in range(2)]
    idle, busy = (peer.listen({"Push": push}) for peer in peers)
    sender = GrpcTransport("127.0.0.1", 1 << 20, 4)
    try:
        over = await sender.call(idle, "Push")
        under_way = await sender.call(busy, "Push")
        over.cancel()
        await asyncio.sleep(0.01)
        with pytest.raises(HandoffRefused, match="cannot be reached"):
            await sender.call("127.0.0.1:1", "Push")
        assert set(sender._channels) == {busy, "127.0.0.1:1"}
        under_way.cancel()
    finally:
        for agent in (sender, *peers):
            await agent.stop()
