"""One push over gRPC, from either end: a stream whose payloads come with its frames."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import numpy as np

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.milestones import Fence, Milestones
from cluster.kv.transport.checksums import host_checksum
from cluster.kv.transport.frames import (
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
from cluster.kv.transport.seam import Buffer
from cluster.kv.transport.staging import Slot, Staging

log = logging.getLogger(__name__)


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

    async def reached(self, filled: Fence) -> None:
        raise AssertionError("nothing is queued on a device")

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
        mark: marks it.
    """

    def __init__(
        self,
        call: Any,
        frame_bytes: int,
        staging: Staging,
        milestones: Milestones,
        mark: Callable[[], Fence | None],
    ) -> None:
        super().__init__(call, frame_bytes)
        self._mark = mark
        self._staging = staging
        self._milestones = milestones
        self._last: asyncio.Task[None] | None = None

    async def buffer(self, size: int) -> Buffer:
        return await self._staging.take(size)

    async def send_blocks(
        self, run: BlockRun, buffer: Buffer, seed: int, filled: Fence | None
    ) -> None:
        assert isinstance(buffer, Slot)
        before = self._last
        self._last = asyncio.create_task(self._send(run, buffer, seed, filled, before))
        # However it ends, and be it before it began. A slot is held until its frame has left, so
        # that a peer that reads slowly holds up the next ones.
        self._last.add_done_callback(lambda _: self._give_back(buffer, filled))
        if before is not None and before.done():
            before.result()

    async def _send(
        self,
        run: BlockRun,
        slot: Slot,
        seed: int,
        filled: Fence | None,
        before: asyncio.Task[None] | None,
    ) -> None:
        await self._milestones.reached(filled)
        wire = BlocksWire(slot.payload.numel())
        np.copyto(wire.payload.numpy(), slot.payload.numpy())  # torch would wake its threads
        sealed = wire.seal(replace(run, checksum=host_checksum(wire.payload, seed)))
        if before is not None:
            await before
        await self._write(sealed)

    def _give_back(self, slot: Slot, filled: Fence | None) -> None:
        self._milestones.then(filled, lambda _: self._staging.give_back(slot))

    async def reached(self, filled: Fence) -> None:
        await self._milestones.reached(filled)

    async def flush(self) -> int:
        if self._last is not None:
            await self._last
        return 0

    def discard(self, buffer: Buffer) -> None:
        """The copy into it may be under way."""
        assert isinstance(buffer, Slot)
        self._give_back(buffer, self._mark())

    def cancel(self) -> None:
        super().cancel()
        if self._last is not None:
            self._last.cancel()
            self._last.add_done_callback(lambda task: task.cancelled() or task.exception())


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


def why(error: BaseException) -> str:
    """What a broken stream means."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return "the decode worker closed the transfer"
    log.warning("push failed: %s: %s", error.code().name, error.details())
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return "the decode worker cannot be reached"
    return f"the decode worker broke the transfer off ({error.code().name})"
