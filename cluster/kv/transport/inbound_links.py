"""Decode's end of links: who may open one, and whose payload is whose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.errors import HandoffRefused
from cluster.kv.doorkeeper import Recent, Terms
from cluster.kv.seldom import Seldom
from cluster.kv.transport.hello import (
    HELLO_SECONDS,
    Hello,
    Payload,
    decode_hello,
    decode_payloads,
    encode_link_reply,
)
from cluster.kv.transport.link import MAX_LINKS, Link, LinkTerms
from cluster.kv.transport.link_slots import ALIGNMENT, MAX_SLOTS
from cluster.kv.transport.nccl_library import LinkTooLarge
from cluster.kv.transport.staging import Slot
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Stream
from cluster.ticket import CLOCK_TOLERANCE_SECONDS, TicketSigner

log = logging.getLogger(__name__)

HELLO_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Arriving:
    """A payload in a slot; what is queued on `link.copies` finds it there."""

    payload: Payload
    slot: Slot
    link: Link
    read: Callable[[int], None]


class Arrivals(asyncio.Queue["Arriving | None"]):
    """A push's payloads, None at the end of its link.

    Attributes:
        coming: set when one comes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coming = asyncio.Event()

    def put_nowait(self, item: Arriving | None) -> None:
        super().put_nowait(item)
        self.coming.set()


class _Reads:
    """Tells the sender which slots' payloads have been read, as many as there are at once."""

    def __init__(self, stream: Stream, link: Link) -> None:
        self._stream = stream
        self._link = link
        self._read: asyncio.Queue[int] = asyncio.Queue()
        self._most = link.slots.free
        self._task = asyncio.create_task(self._tell())

    def add(self, index: int) -> None:
        """Nothing touches the slot any more."""
        self._link.slots.give_back(index)
        self._read.put_nowait(index)
        if self._read.qsize() > self._most:
            self._link.abort("the peer uses slots again before it hears that they are free")

    async def _tell(self) -> None:
        with contextlib.suppress(Broken):
            while True:
                first = await self._read.get()
                free = [first, *(self._read.get_nowait() for _ in range(self._read.qsize()))]
                await self._stream.send(encode_link_reply(free=free))

    def stop(self) -> None:
        self._task.cancel()


class InboundLinks:
    """Serves the Link method, and deals payloads out to the pushes that claim them."""

    def __init__(
        self,
        signer: TicketSigner,
        terms: Terms,
        link_terms: LinkTerms,
    ) -> None:
        self._signer = signer
        self._terms = terms
        self._link_terms = link_terms
        self._strangers = Seldom(log)
        self._links: dict[int, Link] = {}
        self._opening = 0
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
        except (HandoffRefused, torch.OutOfMemoryError) as error:
            refusal = error if isinstance(error, HandoffRefused) else LinkTooLarge(f"link: {error}")
            self._strangers.warning("link refused: %s", refusal)
            with contextlib.suppress(Broken):
                await stream.send(encode_link_reply(refusal))
            return
        self._links[hello.link] = link
        link.when_down(stream.cancel)  # whatever took it down: the peer is to hear of it
        reads = _Reads(stream, link)
        try:
            await stream.send(encode_link_reply())
            while (wire := await stream.receive_whole()) is not None:
                for payload in decode_payloads(wire):
                    await self._arrive(hello.link, link, payload, reads.add)
        except (HandoffRefused, Broken) as error:
            log.warning("link broke: %s", error)
        finally:
            link.abort("the peer closed the link")
            reads.stop()
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
        if hello.link in self._hellos or hello.link in self._links:
            raise HandoffRefused("the link's hello has been used")
        now = time.monotonic()
        self._hellos.add(hello.link, now, now + HELLO_SECONDS + 2 * CLOCK_TOLERANCE_SECONDS)
        if not 0 < hello.slots * hello.slot_bytes <= self._link_terms.memory_bytes:
            raise LinkTooLarge("the link asks for more than handoff.link_bytes, or for nothing")
        if hello.slots > MAX_SLOTS or hello.slot_bytes % ALIGNMENT:
            raise HandoffRefused("the link asks for slots that no payload fits in well")
        if len(self._links) + self._opening >= MAX_LINKS:
            raise HandoffRefused(f"there are {MAX_LINKS} links already")
        self._opening += 1
        try:
            link = Link(hello.unique_id, 1, self._link_terms, hello.slots, hello.slot_bytes)
            try:
                await link.up()
            except BaseException:  # the peer has gone, perhaps
                link.abort("the link did not come up")
                raise
        finally:
            self._opening -= 1
        return link

    async def _arrive(
        self, link_id: int, link: Link, payload: Payload, read: Callable[[int], None]
    ) -> None:
        """Receives a payload, whoever it is for: the next one comes behind it."""
        slot = link.slots.hold(payload.slot, payload.size)
        try:
            await link.receive(slot)
        except BaseException:
            link.abort("a payload was broken off")
            link.release(None, lambda: read(slot.index))
            raise
        arriving = Arriving(payload, slot, link, read)
        claim = self._claims.get((link_id, payload.handoff_id))
        if claim is None:  # its push has ended
            self.discard(arriving)
        else:
            claim.put_nowait(arriving)

    def discard(self, arriving: Arriving) -> None:
        """Frees a payload's slot as soon as nothing writes to it or reads it."""
        link = arriving.link
        link.release(link.mark(), lambda: arriving.read(arriving.slot.index))

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
        for link in list(self._links.values()):
            link.abort("the worker stops")
