"""Decode's end of links: who may open one, and whose payload is whose."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import torch

from cluster.errors import HandoffRefused
from cluster.kv.doorkeeper import Recent, Terms
from cluster.kv.transport.checksums import device_checksum
from cluster.kv.transport.frames import Blocks, Commit, Frame, Open
from cluster.kv.transport.grpc import GrpcInbound
from cluster.kv.transport.hello import (
    HELLO_SECONDS,
    Hello,
    Payload,
    decode_hello,
    decode_payload,
    encode_link_reply,
)
from cluster.kv.transport.link import Link
from cluster.kv.transport.seam import Inbound
from cluster.kv.transport.staging import Slot, Staging
from cluster.ticket import CLOCK_TOLERANCE_SECONDS, TicketSigner

log = logging.getLogger(__name__)

HELLO_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Arriving:
    """A payload on its way into a slot; it is there once `event` is reached."""

    payload: Payload
    slot: Slot
    event: Any
    link: Link


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
        self._links: dict[int, Link] = {}
        self._hellos: Recent[int] = Recent()
        self._claims: dict[tuple[int, str], asyncio.Queue[Arriving | None]] = {}
        self._frees: set[asyncio.Task[None]] = set()

    async def serve(self, frames: AsyncIterator[bytes], context: Any) -> None:
        """One link, from its hello to its end."""
        frames = aiter(frames)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_SECONDS):
                hello = decode_hello(await anext(frames), self._signer)
            link = await self._open(hello)
        except (StopAsyncIteration, TimeoutError):
            return
        except HandoffRefused as refusal:
            log.warning("link refused: %s", refusal)
            await context.write(encode_link_reply(str(refusal)))
            return
        self._links[hello.link] = link
        try:
            await context.write(encode_link_reply(""))
            async for wire in frames:
                await self._arrive(hello.link, link, decode_payload(wire))
        except (HandoffRefused, ValueError, grpc.RpcError) as error:
            log.warning("link broke: %s", error)
        finally:
            link.abort("the peer closed the link")
            del self._links[hello.link]
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
        await link.up()
        return link

    async def _arrive(self, link_id: int, link: Link, payload: Payload) -> None:
        """Receives a payload, whoever it is for: the next one comes behind it."""
        slot = await self._staging.take(payload.size)
        try:
            event = await link.receive(slot)
        except BaseException:
            link.abort("a payload was broken off")
            self._free_later(link, slot)
            raise
        arriving = Arriving(payload, slot, event, link)
        claim = self._claims.get((link_id, payload.handoff_id))
        if claim is None:  # its push has ended
            self.discard(arriving)
        else:
            claim.put_nowait(arriving)

    def discard(self, arriving: Arriving) -> None:
        """Frees a payload's slot as soon as nothing writes to it."""
        self._free_later(arriving.link, arriving.slot, arriving.event)

    def _free_later(self, link: Link, slot: Slot, event: Any = None) -> None:
        async def free() -> None:
            await link.over(event)
            self._staging.give_back(slot)

        task = asyncio.create_task(free())
        self._frees.add(task)
        task.add_done_callback(self._frees.discard)

    def claim(self, link_id: int, handoff_id: str) -> asyncio.Queue[Arriving | None]:
        """Payloads of this handoff from now on. Raises HandoffRefused if there is no such link."""
        if link_id not in self._links:
            raise HandoffRefused("the link that payloads are to come over is down")
        return self._claims.setdefault((link_id, handoff_id), asyncio.Queue())

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
        self._link = 0
        self._handoff_id = ""
        self._queue: asyncio.Queue[Arriving | None] | None = None
        self._taken: dict[int, Arriving] = {}
        self._delivered = 0
        self._commit: Commit | None = None
        self._control: asyncio.Task[Frame | None] | None = None

    @property
    def transport(self) -> str:  # type: ignore[override]
        return "nccl" if self._link else "grpc"

    def claim(self, handoff_id: str) -> None:
        if self._link:
            self._handoff_id = handoff_id
            self._queue = self._links.claim(self._link, handoff_id)

    async def receive(self) -> Frame | None:
        """Frames and payloads in the order they were sent: a commit comes behind its payloads."""
        if self._queue is None:
            frame = await self._inner.receive()
            if isinstance(frame, Open):
                self._link = frame.link
            return frame
        if self._commit is None:
            return await self._next(self._queue)
        if self._delivered >= self._commit.frames:
            return self._commit
        return self._deliver(await self._queue.get())

    async def _next(self, queue: asyncio.Queue[Arriving | None]) -> Frame | None:
        if self._control is None:
            self._control = asyncio.create_task(self._inner.receive())
        arrival = asyncio.create_task(queue.get())
        try:
            await asyncio.wait({arrival, self._control}, return_when=asyncio.FIRST_COMPLETED)
            if arrival.done():
                return self._deliver(arrival.result())
        finally:
            arrival.cancel()
        control, self._control = self._control, None
        frame = control.result()
        if isinstance(frame, Commit):
            self._commit = frame
            return await self.receive()
        if isinstance(frame, Blocks):
            raise HandoffRefused("payloads came with the frames and over a link")
        return frame

    def _deliver(self, arriving: Arriving | None) -> Blocks:
        if arriving is None:
            raise HandoffRefused("the link broke")
        self._delivered += 1
        self._taken[id(arriving.slot.payload)] = arriving
        return Blocks(arriving.payload.run, arriving.slot.payload)

    async def verify(self, blocks: Blocks, seed: int) -> None:
        arriving = self._taken.get(id(blocks.payload))
        if arriving is None:
            return await self._inner.verify(blocks, seed)
        await arriving.link.reached(arriving.event)
        expected = blocks.run.checksum
        if expected:
            found = await asyncio.to_thread(device_checksum, blocks.payload, seed)
            if found != expected:
                raise HandoffRefused(f"frame {blocks.run.sequence}: checksum differs")

    def done(self, blocks: Blocks) -> None:
        if arriving := self._taken.pop(id(blocks.payload), None):
            self._links.discard(arriving)

    async def send(self, reply: Any) -> None:
        await self._inner.send(reply)

    def close(self) -> None:
        if self._control is not None:
            self._control.cancel()
        for arriving in self._links.disclaim(self._link, self._handoff_id):
            self._links.discard(arriving)
