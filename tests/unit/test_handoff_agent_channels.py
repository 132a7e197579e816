"""Channels to peers that have gone are not kept for ever."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest

from cluster.kv.transport import grpc as transport
from cluster.kv.transport.grpc import GrpcTransport


async def test_idle_channels_are_closed_when_another_peer_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.0)
    sender = GrpcTransport("127.0.0.1", 1 << 20, 4)
    gone = sender.call("127.0.0.1:1", "Push")
    busy = sender.call("127.0.0.1:2", "Push")  # nobody listens at either
    assert set(sender._channels) == {"127.0.0.1:1", "127.0.0.1:2"}
    with pytest.raises(grpc.aio.AioRpcError):
        await gone.read()
    sender._channels["127.0.0.1:2"].calls += 1  # as if its call had not ended
    await asyncio.sleep(0.05)
    sender.call("127.0.0.1:3", "Push").cancel()
    assert set(sender._channels) == {"127.0.0.1:2", "127.0.0.1:3"}
    busy.cancel()
    await sender.stop()
