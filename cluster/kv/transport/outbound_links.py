"""Prefill's end of links: what is queued on one, and a push whose payloads cross one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.milestones import Fence
from cluster.kv.transport.checksums import DeviceSum, value
from cluster.kv.transport.frames import Abort, Commit, Open, Reply
from cluster.kv.transport.grpc_streams import GrpcOutbound
from cluster.kv.transport.hello import Payload, encode_payloads
from cluster.kv.transport.link import Link
from cluster.kv.transport.seam import Buffer
from cluster.kv.transport.staging import Share, Slot, Staging
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Stream

_Queued = tuple[Payload, Slot, Fence | None, asyncio.Future[None]]


class OutboundLink:
    """A link to a peer, from its making to its end.

    Payloads are queued here and leave in that order: the headers of all that wait in one message,
    then the payloads, which is the order in which the peer receives them.

    Args:
        link_id: names it on both sides.
        stream: the gRPC stream of its headers.
    """

    def __init__(self, link_id: int, stream: Stream, link: Link, staging: Staging) -> None:
        self.id = link_id
        self.link = link
        self.staging = Share(staging)
        self._stream = stream
        self._queue: asyncio.Queue[_Queued] = asyncio.Queue()
        self._batch: list[_Queued] = []
        self._pump = asyncio.create_task(self._send_all())
        self._watcher = asyncio.create_task(self._watch())

    def send(self, payload: Payload, slot: Slot, filled: Fence | None) -> asyncio.Future[None]:
        """Done when the payload has left; fails with HandoffRefused."""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent.add_done_callback(lambda _: sent.cancelled() or sent.exception())  # may go unheard
        self._queue.put_nowait((payload, slot, filled, sent))
        if self._pump.done():
            self._give_up()
        return sent

    async def _send_all(self) -> None:
        try:
            while True:
                first = await self._queue.get()
                self._batch = [
                    first,
                    *(self._queue.get_nowait() for _ in range(self._queue.qsize())),
                ]
                await self._stream.send(encode_payloads([queued[0] for queued in self._batch]))
                while self._batch:
                    _, slot, filled, sent = self._batch[0]
                    fence = await self.link.send(slot, filled)
                    del self._batch[0]
                    self.link.release(fence, partial(self._left, slot, sent))
        except Broken:
            self.link.abort("the peer closed the link")
        except HandoffRefused as broken:
            self.link.abort(str(broken))
        finally:
            # A header without its payload would shift every payload behind it.
            self.link.abort("a payload was broken off")
            self._give_up()

    def _left(self, slot: Slot, sent: asyncio.Future[None]) -> None:
        self.staging.give_back(slot)
        if sent.done():
            return
        if self.link.broken:
            sent.set_exception(HandoffRefused(self.link.broken))
        else:
            sent.set_result(None)

    def _give_up(self) -> None:
        """What has not left does not leave: its slot is free when it has been filled. The first of
        a batch may have begun to leave: its slot is free after the abort, too."""
        waiting = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        for _, slot, filled, sent in self._batch[:1]:
            left = partial(self._left, slot, sent)
            self.link.release(filled, partial(self.link.release, None, left))
        for _, slot, filled, sent in self._batch[1:] + waiting:
            self.link.release(filled, partial(self._left, slot, sent))
        self._batch = []

    async def _watch(self) -> None:
        """Ends the link with its stream."""
        with contextlib.suppress(Broken):
            await self._stream.receive()
        self.link.abort("the peer closed the link")

    def close(self, reason: str) -> None:
        self.link.abort(reason)
        self._pump.cancel()
        self._stream.cancel()


class NcclOutbound:
    """A push whose payloads cross a link.

    Args:
        checksums: every how many payloads count for the checksum; 0: none.
        seed: of the checksum.
    """

    transport = "nccl"

    def __init__(self, inner: GrpcOutbound, link: OutboundLink, handoff_id: str, checksums: int):
        self._inner = inner
        self._link = link
        self._handoff_id = handoff_id
        self._checksums = checksums
        self._sum: DeviceSum | None = None
        self._sent: list[asyncio.Future[None]] = []
        self.link = link.id
        self.stream = link.link.copies
        self.frame_bytes = link.staging.slot_bytes

    async def buffer(self, size: int) -> Buffer:
        return await self._link.staging.take(size)

    async def send_blocks(
        self, run: BlockRun, buffer: Buffer, seed: int, filled: Fence | None
    ) -> None:
        assert isinstance(buffer, Slot)
        summed = bool(self._checksums) and run.sequence % self._checksums == 0
        if summed:
            try:
                if self._sum is None:
                    self._sum = DeviceSum(buffer.payload.device, self.stream, seed)
                self._sum.add(buffer.payload)
            except BaseException:
                self.discard(buffer)
                raise
            filled = self._link.link.mark()  # the slot is read until then
        payload = Payload(self._handoff_id, run, buffer.payload.numel(), summed)
        self._sent.append(self._link.send(payload, buffer, filled))

    async def send_pieces(self, run: BlockRun, pieces: Sequence[memoryview], seed: int) -> None:
        raise AssertionError("nothing crosses a link from host memory")

    async def reached(self, filled: Fence) -> None:
        await self._link.link.reached(filled)

    async def flush(self) -> int:
        fetched = None if self._sum is None else self._sum.fetch()
        link = self._link.link
        await link.reached(link.mark())
        for sent in self._sent:
            await asyncio.shield(sent)
        return 0 if fetched is None else value(fetched)

    def discard(self, buffer: Buffer) -> None:
        assert isinstance(buffer, Slot)
        link = self._link.link
        link.release(link.mark(), lambda: self._link.staging.give_back(buffer))

    async def send(self, frame: Open | Commit | Abort) -> None:
        await self._inner.send(frame)

    async def receive(self) -> Reply:
        return await self._inner.receive()

    def cancel(self) -> None:
        self._inner.cancel()
