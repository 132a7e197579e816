"""Decode's end of links: who may open one, and whose payload is whose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.errors import HandoffRefused
from cluster.kv.doorkeeper import Recent, Terms
from cluster.kv.milestones import Fence
from cluster.kv.seldom import Seldom
from cluster.kv.transport.checksums import DeviceSum, value
from cluster.kv.transport.frames import Blocks, Coming, Commit, Frame, Open
from cluster.kv.transport.grpc_streams import GrpcInbound
from cluster.kv.transport.hello import (
    HELLO_SECONDS,
    Hello,
    Payload,
    decode_hello,
    decode_payloads,
    encode_link_reply,
)
from cluster.kv.transport.link import Link
from cluster.kv.transport.seam import Inbound
from cluster.kv.transport.staging import Share, Slot, Staging
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Stream
from cluster.ticket import CLOCK_TOLERANCE_SECONDS, TicketSigner

log = logging.getLogger(__name__)

HELLO_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Arriving:
    """A payload on its way into a slot; what is queued on `link.copies` finds it there."""

    payload: Payload
    slot: Slot
    link: Link
    room: Share


class Arrivals(asyncio.Queue["Arriving | None"]):
    """A push's payloads, None at the end of its link.

    Attributes:
        coming: set while there is one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coming = asyncio.Event()

    def put_nowait(self, item: Arriving | None) -> None:
        super().put_nowait(item)
        self.coming.set()

    def get_nowait(self) -> Arriving | None:
        item = super().get_nowait()
        if self.empty():
            self.coming.clear()
        return item


class InboundLinks:
    """Serves the Link method, and deals payloads out to the pushes that claim them."""

    def __init__(
        self,
        signer: TicketSigner,
        terms: Terms,
        device: torch.device,
        stuck_seconds: float,
        staging: Staging,
    ) -> None:
        self._signer = signer
        self._terms = terms
        self._device = device
        self._stuck_seconds = stuck_seconds
        self._staging = staging
        self._strangers = Seldom(log)
        self._links: dict[int, Link] = {}
        self._rooms: dict[int, Share] = {}
        self._hellos: Recent[int] = Recent()
        self._claims: dict[tuple[int, str], Arrivals] = {}

    async def serve(self, stream: Stream) -> None:
        """One link, from its hello to its end."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_SECONDS):
                wire = await stream.receive_whole()
            if wire is None:
                return
            link = await self._open(hello := decode_hello(wire, self._signer))
        except (Broken, TimeoutError):
            return
        except HandoffRefused as refusal:
            self._strangers.warning("link refused: %s", refusal)
            with contextlib.suppress(Broken):
                await stream.send(encode_link_reply(str(refusal)))
            return
        self._links[hello.link] = link
        try:
            await stream.send(encode_link_reply(""))
            while (wire := await stream.receive_whole()) is not None:
                for payload in decode_payloads(wire):
                    await self._arrive(hello.link, link, payload)
        except (HandoffRefused, ValueError, Broken) as error:
            log.warning("link broke: %s", error)
        finally:
            link.abort("the peer closed the link")
            del self._links[hello.link]
            self._rooms.pop(hello.link, None)
            for (owner, _), queue in list(self._claims.items()):
                if owner == hello.link:
                    queue.put_nowait(None)

    async def _open(self, hello: Hello) -> Link:
        terms = self._terms
        if (hello.decode_worker, hello.decode_incarnation, hello.decode_rank) != (
            terms.worker_id,
            terms.incarnation,
            terms.rank,
        ):
            raise HandoffRefused("the link is for another worker, life or rank")
        if hello.link in self._hellos:
            raise HandoffRefused("the link's hello has been used")
        now = time.monotonic()
        self._hellos.add(hello.link, now, now + HELLO_SECONDS + 2 * CLOCK_TOLERANCE_SECONDS)
        link = Link(hello.unique_id, 1, self._device, self._stuck_seconds, None)
        try:
            await link.up()
        except BaseException:  # the peer has gone, perhaps
            link.abort("the link did not come up")
            raise
        return link

    async def _arrive(self, link_id: int, link: Link, payload: Payload) -> None:
        """Receives a payload, whoever it is for: the next one comes behind it."""
        room = self._rooms.setdefault(link_id, Share(self._staging))
        slot = await room.take(payload.size)
        try:
            await link.receive(slot)
        except BaseException:
            link.abort("a payload was broken off")
            link.release(None, lambda: room.give_back(slot))
            raise
        arriving = Arriving(payload, slot, link, room)
        claim = self._claims.get((link_id, payload.handoff_id))
        if claim is None:  # its push has ended
            self.discard(arriving)
        else:
            claim.put_nowait(arriving)

    def discard(self, arriving: Arriving) -> None:
        """Frees a payload's slot as soon as nothing writes to it or reads it."""
        link = arriving.link
        link.release(link.mark(), lambda: arriving.room.give_back(arriving.slot))

    def claim(self, link_id: int, handoff_id: str) -> tuple[Link, Arrivals]:
        """Payloads of this handoff from now on. Raises HandoffRefused if there is no such link."""
        if link_id not in self._links:
            raise HandoffRefused("the link that payloads are to come over is down")
        queue = self._claims.setdefault((link_id, handoff_id), Arrivals())
        return self._links[link_id], queue

    def disclaim(self, link_id: int, handoff_id: str) -> list[Arriving]:
        """No payload of the handoff is wanted any more; returns those that had come."""
        queue = self._claims.pop((link_id, handoff_id), None)
        left = []
        while queue is not None and not queue.empty():
            if arriving := queue.get_nowait():
                left.append(arriving)
        return left

    def close(self) -> None:
        for link in self._links.values():
            link.abort("the worker stops")


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

    @property
    def transport(self) -> str:  # type: ignore[override]
        return "nccl" if self._link_id else "grpc"

    @property
    def stream(self) -> Any:
        return self._inner.stream if self._link is None else self._link.copies

    def claim(self, handoff_id: str) -> None:
        if self._link_id:
            self._handoff_id = handoff_id
            self._link, self._queue = self._links.claim(self._link_id, handoff_id)

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
        if queue.empty():
            # Only looked at, not taken, until nothing can break this wait off any more.
            arrival = asyncio.create_task(queue.coming.wait())
            try:
                await asyncio.wait({arrival, self._control}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                arrival.cancel()
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

    async def fetch(self, coming: Coming) -> Blocks:
        return await self._inner.fetch(coming)

    def verify(self, blocks: Blocks, seed: int) -> None:
        arriving = self._taken.get(id(blocks.payload))
        if arriving is None:
            return self._inner.verify(blocks, seed)
        if arriving.payload.summed:
            if self._sum is None:
                self._sum = DeviceSum(blocks.payload.device, self.stream, seed)
            self._sum.add(blocks.payload)

    async def reached(self, fence: Fence | None) -> None:
        await (self._inner if self._link is None else self._link).reached(fence)

    async def judge(self, commit: Commit) -> None:
        found = 0
        if self._sum is not None:
            assert self._link is not None
            fetched = self._sum.fetch()
            await self.reached(self._link.mark())
            found = value(fetched)
        if found != commit.checksum:
            raise HandoffRefused("checksum differs")

    def done(self, blocks: Blocks) -> None:
        if arriving := self._taken.pop(id(blocks.payload), None):
            self._links.discard(arriving)
        else:
            self._inner.done(blocks)

    async def send(self, reply: Any) -> None:
        await self._inner.send(reply)

    def close(self) -> None:
        if self._control is not None:
            self._control.cancel()
        for arriving in self._links.disclaim(self._link_id, self._handoff_id):
            self._links.discard(arriving)
