"""Decode's end of a push whose payloads cross a link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import HandoffRefused
from cluster.kv.milestones import Fence
from cluster.kv.transport.checksums import DeviceSum, Tally, seed_of, value
from cluster.kv.transport.frames import Blocks, Coming, Commit, Frame, Open
from cluster.kv.transport.grpc_streams import GrpcInbound
from cluster.kv.transport.inbound_links import Arrivals, Arriving, InboundLinks
from cluster.kv.transport.link import Link
from cluster.kv.transport.seam import Inbound


class LinkedInbound(Inbound):
    """A push whose payloads come with its frames or over a link, as its first frame says."""

    def __init__(self, inner: GrpcInbound, links: InboundLinks) -> None:
        self._inner = inner
        self._links = links
        self._link_id = 0
        self._link: Link | None = None
        self._handoff_id = ""
        self._queue: Arrivals | None = None
        self._taken: dict[int, Arriving] = {}
        self._delivered = 0
        self._commit: Commit | None = None
        self._commit_told = False
        self._control: asyncio.Task[Frame | None] | None = None
        self._sum: DeviceSum | None = None
        self._summed = False

    @property
    def transport(self) -> str:  # type: ignore[override]
        return "nccl" if self._link_id else "grpc"

    @property
    def stream(self) -> Any:
        return self._inner.stream if self._link is None else self._link.copies

    def claim(self, handoff_id: str) -> None:
        if self._link_id:
            self._handoff_id = handoff_id
            link, self._queue = self._links.claim(self._link_id, handoff_id)
            self._link = link
            self._sum = DeviceSum(link.device, link.copies, seed_of(handoff_id))

    async def receive(self) -> Frame | None:
        """Frames and payloads in the order they were sent: a commit comes behind its payloads."""
        if self._queue is None:
            frame = await self._inner.receive()
            if isinstance(frame, Open):
                self._link_id = frame.link
            return frame
        if self._commit is None:
            return await self._next(self._queue)
        if self._commit_told:
            return await self._inner.receive()
        if self._delivered >= self._commit.frames:
            self._commit_told = True
            return self._commit
        return self._deliver(await self._queue.get())

    async def _next(self, queue: Arrivals) -> Frame | None:
        if self._control is None:
            self._control = asyncio.create_task(self._inner.receive())
            self._control.add_done_callback(lambda _: queue.coming.set())
        # Only looked at, not taken, until nothing can break this wait off any more.
        while queue.empty() and not self._control.done():
            queue.coming.clear()
            await queue.coming.wait()
        if not queue.empty():
            return self._deliver(queue.get_nowait())
        control, self._control = self._control, None
        frame = control.result()
        if isinstance(frame, Commit):
            self._commit = frame
            return await self.receive()
        if isinstance(frame, Blocks | Coming):
            raise HandoffRefused("payloads came with the frames and over a link")
        return frame

    def _deliver(self, arriving: Arriving | None) -> Blocks:
        if arriving is None:
            raise HandoffRefused("the link broke")
        self._delivered += 1
        self._taken[id(arriving.slot.payload)] = arriving
        return Blocks(arriving.payload.run, arriving.slot.payload)

    async def read(
        self,
        coming: Coming,
        pieces: Sequence[memoryview],
        allowed: Callable[[], None],
        seed: int,
    ) -> None:
        await self._inner.read(coming, pieces, allowed, seed)

    async def fetch(self, coming: Coming, seed: int) -> Blocks:
        return await self._inner.fetch(coming, seed)

    def verify(self, blocks: Blocks, seed: int) -> Tally | None:
        arriving = self._taken.get(id(blocks.payload))
        if arriving is None:
            self._inner.verify(blocks, seed)
            return None
        if not arriving.payload.summed:
            return None
        assert self._sum is not None
        self._summed = True
        return Tally(self._sum, blocks.run.sequence)

    async def reached(self, fence: Fence | None) -> None:
        await (self._inner if self._link is None else self._link).reached(fence)

    async def judge(self, commit: Commit) -> None:
        found = 0
        if self._summed:
            assert self._link is not None and self._sum is not None
            fetched = self._sum.fetch()
            await self.reached(self._link.mark())
            found = value(fetched)
        if found != commit.checksum:
            raise HandoffRefused("checksum differs")

    def done(self, blocks: Blocks, read: bool = False) -> None:
        if arriving := self._taken.pop(id(blocks.payload), None):
            if read:
                arriving.read(arriving.slot.index)
            else:
                self._links.discard(arriving)
        else:
            self._inner.done(blocks, read)

    async def send(self, reply: Any) -> None:
        await self._inner.send(reply)

    def close(self) -> None:
        if self._control is not None:
            self._control.cancel()
        for arriving in self._links.disclaim(self._link_id, self._handoff_id):
            self._links.discard(arriving)
