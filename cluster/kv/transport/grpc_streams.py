"""One push over gRPC, from either end: a stream whose payloads come with its frames."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.milestones import Fence, Milestones
from cluster.kv.transport.checksums import ChecksumSeal, PassingSum, host_checksum
from cluster.kv.transport.frames import (
    CHECKSUM_BYTES,
    Abort,
    Blocks,
    Coming,
    Commit,
    Frame,
    Open,
    Reply,
    blocks_header,
    decode_checksum,
    decode_frame,
    decode_head,
    decode_reply,
    encode_frame,
    encode_reply,
)
from cluster.kv.transport.seam import Buffer
from cluster.kv.transport.staging import HostMemory, PinnedMemory, Share, Slot, Staging
from cluster.kv.transport.streams.reading import Broken, Incoming
from cluster.kv.transport.streams.stream import Stream
from cluster.kv.transport.streams.views import Views

log = logging.getLogger(__name__)

REPLY_SECONDS = 10.0
"""A peer that takes no reply for so long has its stream ended."""


@dataclass
class HostBuffer:
    """Memory of one payload's own."""

    payload: torch.Tensor


class GrpcOutbound:
    """A push whose payloads come with the frames."""

    transport = "grpc"
    link = 0
    bursts = False
    stream = None

    def __init__(self, stream: Stream, frame_bytes: int) -> None:
        self._stream = stream
        self.frame_bytes = frame_bytes

    async def buffer(self, size: int) -> Buffer:
        return HostBuffer(torch.empty(size, dtype=torch.uint8))

    def tally(self, sequence: int) -> None:
        """None: payloads are counted as they leave."""

    async def send_pieces(self, run: BlockRun, pieces: Sequence[memoryview], seed: int) -> None:
        """Sends a payload from where it lies, which must be host memory."""
        await self._send_payload(run, pieces, seed, lendable=False)

    async def send_blocks(
        self, run: BlockRun, buffer: Buffer, seed: int, filled: Fence | None
    ) -> None:
        await self._send_buffer(run, buffer, seed)

    async def _send_buffer(self, run: BlockRun, buffer: Buffer, seed: int) -> None:
        await self._send_payload(run, [memoryview(buffer.payload.numpy())], seed, lendable=True)

    async def _send_payload(
        self, run: BlockRun, pieces: Sequence[memoryview], seed: int, lendable: bool
    ) -> None:
        size = sum(map(len, pieces))
        seal = ChecksumSeal(PassingSum(size, seed))
        with _refused():
            await self._stream.send_sealed(blocks_header(run, size), pieces, seal, lendable)

    async def reached(self, filled: Fence) -> None:
        raise AssertionError("nothing is queued on a device")

    async def flush(self) -> int:
        return 0

    def discard(self, buffer: Buffer) -> None:
        """Nothing: the buffer is its own memory."""

    async def send(self, frame: Open | Commit | Abort) -> None:
        with _refused():
            await self._stream.send(encode_frame(frame))

    async def receive(self) -> Reply:
        with _refused():
            wire = await self._stream.receive()
        if wire is None:
            raise HandoffRefused("the decode worker closed the transfer")
        if isinstance(wire, Incoming):
            raise HandoffRefused("the peer's reply is malformed")
        return decode_reply(wire)

    def cancel(self) -> None:
        self._stream.cancel()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except Broken as broken:
        log.warning("push failed: %s", broken)
        raise HandoffRefused(f"the decode worker broke the transfer off: {broken}") from None


class StagedOutbound(GrpcOutbound):
    """The same from a device: payloads are copied into pinned memory, and leave from there while
    the next ones are copied.

    Args:
        milestones: of the stream on which the copies are queued.
        mark: marks it.
    """

    def __init__(
        self,
        stream: Stream,
        frame_bytes: int,
        staging: Staging | Share,
        milestones: Milestones,
        mark: Callable[[], Fence | None],
    ) -> None:
        super().__init__(stream, frame_bytes)
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
        if before is not None:
            await before
        await self._send_buffer(run, slot, seed)

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
        memory: for payloads that cannot go to their places at once.
    """

    transport = "grpc"
    stream = None

    def __init__(
        self, stream: Stream, milestones: Milestones, memory: HostMemory | PinnedMemory
    ) -> None:
        self._stream = stream
        self._milestones = milestones
        self._memory = memory
        self._slots: dict[int, Slot] = {}

    async def receive(self) -> Frame | None:
        try:
            message = await self._stream.receive()
        except Broken:
            return None
        if message is None:
            return None
        if isinstance(message, Incoming):
            return decode_head(message)
        return decode_frame(message)

    def claim(self, handoff_id: str) -> None:
        """Nothing: the payloads of this push come with its frames."""

    async def read(
        self,
        coming: Coming,
        pieces: Sequence[memoryview],
        allowed: Callable[[], None],
        seed: int,
    ) -> None:
        await self._read(coming, pieces, allowed, seed)

    async def _read(
        self,
        coming: Coming,
        pieces: Sequence[memoryview],
        allowed: Callable[[], None] | None,
        seed: int,
    ) -> None:
        passing, end = PassingSum(coming.size, seed), bytearray(CHECKSUM_BYTES)
        try:
            views = Views([*pieces, memoryview(end)])
            await coming.rest.read_into(views, allowed, passing.add)
        except Broken:
            raise HandoffRefused("prefill stopped half-way") from None
        _compare(coming.run, passing.value(), decode_checksum(end))

    async def fetch(self, coming: Coming, seed: int) -> Blocks:
        slot = await self._memory.take(coming.size)
        try:
            await self._read(coming, [memoryview(slot.payload.numpy())], None, seed)
        except BaseException:
            self._memory.give_back(slot, read=True)
            raise
        self._slots[id(slot.payload)] = slot
        return Blocks(coming.run, slot.payload)

    def verify(self, blocks: Blocks, seed: int) -> None:
        _compare(blocks.run, host_checksum(blocks.payload, seed), blocks.checksum)

    async def reached(self, fence: Fence | None) -> None:
        await self._milestones.reached(fence)

    async def judge(self, commit: Commit) -> None:
        if commit.checksum:
            raise HandoffRefused("a checksum of payloads that did not come over a link")

    def done(self, blocks: Blocks, read: bool = False) -> None:
        if slot := self._slots.pop(id(blocks.payload), None):
            self._memory.give_back(slot, read)

    async def send(self, reply: Reply) -> None:
        with contextlib.suppress(Broken, TimeoutError):  # a peer that is gone needs no reply
            async with asyncio.timeout(REPLY_SECONDS):
                await self._stream.send(encode_reply(reply))

    def close(self) -> None:
        """Nothing: the stream ends with its method."""


def _compare(run: BlockRun, found: int, sent: int) -> None:
    if found != sent:
        raise HandoffRefused(f"frame {run.sequence}: checksum differs")
