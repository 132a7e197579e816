"""A peer at the transfer port that sends anything it likes, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import grpc.aio
import torch

from cluster.kv.assembly import BlockRun
from cluster.kv.geometry import HeadRun
from cluster.kv.transport.checksums import host_checksum, seed_of
from cluster.kv.transport.frames import (
    Ack,
    Blocks,
    Frame,
    Grant,
    Refused,
    Reply,
    decode_reply,
    encode_frame,
)
from cluster.ticket import Ticket
from tests.handoff.agents import HEADS, LAYERS, Decode, Prefill

METHOD = "/pdserve.v1.KvTransfer/Push"


class RawPush:
    """One push, written and read by hand."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call

    async def send(self, *frames: Frame | bytes) -> None:
        """Until the port closes the push; its replies say why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for frame in frames:
                await self._call.write(frame if isinstance(frame, bytes) else encode_frame(frame))

    async def reply(self) -> Reply | None:
        """The next reply; None when the port has closed the push."""
        wire = await self._call.read()
        return None if wire is grpc.aio.EOF else decode_reply(wire)

    async def granted(self) -> Grant:
        grant = await self.reply()
        assert isinstance(grant, Grant), grant
        return grant

    async def replies(self) -> list[Reply]:
        """All that are still to come."""
        found = []
        while (reply := await self.reply()) is not None:
            found.append(reply)
        return found

    async def end(self) -> list[Reply]:
        """Says that nothing more will come."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self._call.done_writing()
        return await self.replies()


class RawPeer:
    """One connection to an agent."""

    def __init__(self, decode: Decode | Prefill) -> None:
        self._channel = grpc.aio.insecure_channel(
            decode.agent.address, options=[("grpc.use_local_subchannel_pool", 1)]
        )

    def begin(self) -> RawPush:
        return RawPush(self._channel.stream_stream(METHOD)())

    async def push(self, *frames: Frame | bytes) -> list[Reply]:
        """Sends the frames and gathers every reply until the port closes the push."""
        push = self.begin()
        await push.send(*frames)
        return await push.end()

    async def close(self) -> None:
        await self._channel.close()


def frame_of(
    prefill: Prefill,
    ticket: Ticket,
    sequence: int,
    layer: int,
    block_ids: tuple[int, ...],
    first_block: int = 0,
    num_layers: int = 1,
) -> Blocks:
    """A right frame: these blocks of some layers."""
    payload = torch.empty(num_layers, len(block_ids) * prefill.cache.block_bytes, dtype=torch.uint8)
    for i in range(num_layers):
        layers = range(layer + i, layer + i + 1)
        prefill.cache.gather(layers, prefill.cache.index(block_ids), HeadRun(0, HEADS), payload[i])
    if (copied := prefill.cache.mark()) is not None:
        copied.synchronize()
    digest = host_checksum(payload.flatten(), seed_of(ticket.handoff_id))
    run = BlockRun(sequence, layer, num_layers, first_block, len(block_ids))
    return Blocks(run, payload.flatten(), digest)


def whole_prompt(prefill: Prefill, ticket: Ticket, block_ids: tuple[int, ...]) -> list[Blocks]:
    """One frame a layer."""
    return [frame_of(prefill, ticket, layer, layer, block_ids) for layer in range(LAYERS)]


def contents(decode: Decode | Prefill, block_ids: Iterable[int]) -> torch.Tensor:
    """What lies in some blocks: `[layers, blocks, heads, tokens, content]`, a copy on the host."""
    return torch.stack([layer[list(block_ids)] for layer in decode.cache._items]).cpu()


def landed(
    prefill: Prefill, decode: Decode, sources: Iterable[int], targets: Iterable[int]
) -> bool:
    """Decode's blocks hold prefill's, bit for bit."""
    return torch.equal(contents(prefill, sources), contents(decode, targets))


async def refused(
    decode: Decode, peer: RawPeer, ticket: Ticket, wire: bytes, *frames: Frame | bytes
) -> str:
    """Reserves blocks 5 and 6 and pushes; asserts that nothing came of it; returns the reason."""
    decode.reserve(ticket, wire, (5, 6))
    replies = await peer.push(*frames)
    assert not any(isinstance(reply, Ack) for reply in replies)
    refusal = replies[-1]
    assert isinstance(refusal, Refused)
    result = await decode.result(ticket.handoff_id)
    assert result.error == refusal.reason
    assert f"d-{ticket.handoff_id}" in decode.finished.failed
    assert decode.pinned() == 0
    return refusal.reason
