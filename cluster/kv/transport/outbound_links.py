"""Prefill's end of links: what is queued on one, and a push whose payloads cross one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.milestones import Fence
from cluster.kv.transport.checksums import DeviceSum, Tally, seed_of, value
from cluster.kv.transport.frames import Abort, Commit, Open, Reply
from cluster.kv.transport.grpc_streams import GrpcOutbound
from cluster.kv.transport.hello import Payload, decode_link_reply, encode_payloads
from cluster.kv.transport.link import WATCH_SECONDS, Link
from cluster.kv.transport.seam import Buffer
from cluster.kv.transport.staging import Slot
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Stream


@dataclass
class _Leaving:
    """A payload on its way out.

    Attributes:
        sent: done when it has left; fails with HandoffRefused.
        announced: the peer was told of it, or is being told.
        read: the peer has read it.
    """

    payload: Payload
    slot: Slot
    filled: Fence | None
    sent: asyncio.Future[None]
    announced: bool = False
    read: bool = False


class OutboundLink:
    """A link to a peer, from its making to its end.

    Payloads are queued here and leave in that order, the headers of all that are as far in one
    message: once they are in the peer's memory, or before they are sent. A slot is free when the
    peer has read its payload.

    Args:
        link_id: names it on both sides.
        stream: the gRPC stream of its headers.

    Attributes:
        pushes: how many use it now.
    """

    def __init__(self, link_id: int, stream: Stream, link: Link) -> None:
        self.id = link_id
        self.link = link
        self._stream = stream
        self._queue: asyncio.Queue[_Leaving] = asyncio.Queue()
        self._crossing: asyncio.Queue[tuple[_Leaving, Fence]] = asyncio.Queue()
        self._next: tuple[_Leaving, Fence] | None = None
        self._under_way: dict[int, _Leaving] = {}
        self._reads = 0
        self.pushes = 0
        pump = self._announce_all if link.puts else self._send_all
        self._pumps = [
            asyncio.create_task(self._pump(pump)),
            asyncio.create_task(self._notice_standstill()),
        ]
        self._watcher = asyncio.create_task(self._watch())
        link.when_down(self._lose_all)

    def send(self, payload: Payload, slot: Slot, filled: Fence | None) -> asyncio.Future[None]:
        """Done when the payload has left; fails with HandoffRefused."""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sent.add_done_callback(lambda _: sent.cancelled() or sent.exception())  # may go unheard
        leaving = _Leaving(payload, slot, filled, sent)
        self._under_way[slot.index] = leaving
        if self.link.broken:
            self._lose(leaving)
        elif self.link.puts:
            self._put(leaving)
        else:
            self._queue.put_nowait(leaving)
        return sent

    def _put(self, leaving: _Leaving) -> None:
        try:
            self._crossing.put_nowait((leaving, self.link.put(leaving.slot, leaving.filled)))
        except Exception as error:  # whatever the device says
            self.link.abort(f"a payload could not be put: {error}")

    async def _pump(self, pump: Callable[[], Awaitable[None]]) -> None:
        try:
            while True:
                await pump()
        except Broken:
            self.link.abort("the peer closed the link")
        except HandoffRefused as broken:
            self.link.abort(str(broken))
        finally:
            # A header without its payload would shift every payload behind it.
            self.link.abort("a payload was broken off")

    async def _send_all(self) -> None:
        batch = await _all_of(self._queue)
        await self._announce(batch)
        for leaving in batch:
            fence = await self.link.send(leaving.slot, leaving.filled)
            self.link.release(fence, partial(self._left, leaving))

    async def _announce_all(self) -> None:
        """What has crossed by the time the first one has."""
        leaving, fence = self._next or await self._crossing.get()
        self._next = None
        await self.link.reached(fence)
        there = [leaving]
        while not self._crossing.empty():
            leaving, fence = self._crossing.get_nowait()
            if not fence.query():
                self._next = leaving, fence
                break
            there.append(leaving)
        await self._announce(there)
        for leaving in there:
            self._left(leaving)

    async def _announce(self, batch: list[_Leaving]) -> None:
        for leaving in batch:
            leaving.announced = True
        await self._stream.send(encode_payloads([leaving.payload for leaving in batch]))

    def _left(self, leaving: _Leaving) -> None:
        if leaving.sent.done():
            return
        if self.link.broken:
            leaving.sent.set_exception(HandoffRefused(self.link.broken))
            return
        leaving.sent.set_result(None)
        self._free_if_read(leaving)

    def _lose_all(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        for leaving in list(self._under_way.values()):
            self._lose(leaving)
        self._stream.cancel()  # whatever took the link down: the peer is to hear of it

    def _lose(self, leaving: _Leaving) -> None:
        """It does not leave, or nobody will say that it was read: its slot is free when it has been
        filled and, as it may have begun to leave, after the abort."""
        self._under_way.pop(leaving.slot.index, None)

        def over() -> None:
            self._left(leaving)
            self.link.slots.give_back(leaving.slot.index)

        self.link.release(leaving.filled, partial(self.link.release, None, over))

    async def _watch(self) -> None:
        """Takes back what the peer has read, and ends the link with its stream."""
        reason = "the peer closed the link"
        try:
            with contextlib.suppress(Broken):
                while (wire := await self._stream.receive_whole()) is not None:
                    for index in decode_link_reply(wire):
                        self._read(index)
        except HandoffRefused as broken:
            reason = str(broken)
        finally:
            self.link.abort(reason)

    def _read(self, index: int) -> None:
        if self.link.broken:
            return
        leaving = self._under_way.get(index)
        if leaving is None or leaving.read or not leaving.announced:
            raise HandoffRefused("the peer has read a slot that it was not told of")
        leaving.read = True
        self._reads += 1
        self._free_if_read(leaving)

    def _free_if_read(self, leaving: _Leaving) -> None:
        """Whatever the peer says, the slot is not filled anew before its payload has left."""
        if leaving.read and leaving.sent.done():
            del self._under_way[leaving.slot.index]
            self.link.slots.give_back(leaving.slot.index)

    async def _notice_standstill(self) -> None:
        """Ends a link whose peer was told of payloads and reads none of them for too long. Counts
        its own turns: a loop that was held up itself has not heard the peer meanwhile."""
        waited = 0.0
        while waited < self.link.stuck_seconds:
            reads = self._reads
            await asyncio.sleep(WATCH_SECONDS)
            told = any(leaving.announced for leaving in self._under_way.values())
            waited = waited + WATCH_SECONDS if told and reads == self._reads else 0.0
        self.link.abort("the peer reads nothing that crosses the link")

    def close(self, reason: str) -> None:
        self.link.abort(reason)


async def _all_of(queue: asyncio.Queue[_Leaving]) -> list[_Leaving]:
    """Waits for one, and takes what there is by then."""
    first = await queue.get()
    return [first, *(queue.get_nowait() for _ in range(queue.qsize()))]


class NcclOutbound:
    """A push whose payloads cross a link.

    Args:
        checksums: every how many payloads count for the checksum; 0: none.
    """

    transport = "nccl"

    def __init__(self, inner: GrpcOutbound, link: OutboundLink, handoff_id: str, checksums: int):
        self._inner = inner
        self._link = link
        self._handoff_id = handoff_id
        self._checksums = checksums
        device, self.stream = link.link.device, link.link.copies
        self._sum = DeviceSum(device, self.stream, seed_of(handoff_id)) if checksums else None
        self._sent: list[asyncio.Future[None]] = []
        self._over = False
        link.pushes += 1
        self.link = link.id
        self.bursts = link.link.puts
        self.frame_bytes = link.link.slots.largest

    async def buffer(self, size: int) -> Buffer:
        return await self._link.link.slots.take(size)

    def tally(self, sequence: int) -> Tally | None:
        if self._sum is None or sequence % self._checksums:
            return None
        return Tally(self._sum, sequence)

    async def send_blocks(
        self, run: BlockRun, buffer: Buffer, seed: int, filled: Fence | None
    ) -> None:
        assert isinstance(buffer, Slot)
        summed = self.tally(run.sequence) is not None
        payload = Payload(self._handoff_id, run, buffer.payload.numel(), summed, buffer.index)
        self._sent.append(self._link.send(payload, buffer, filled))
        await asyncio.sleep(0)  # what has crossed meanwhile is announced

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
        link.release(link.mark(), lambda: link.slots.give_back(buffer.index))

    async def send(self, frame: Open | Commit | Abort) -> None:
        await self._inner.send(frame)

    async def receive(self) -> Reply:
        return await self._inner.receive()

    def cancel(self) -> None:
        self._inner.cancel()
        if not self._over:
            self._over = True
            self._link.pushes -= 1
