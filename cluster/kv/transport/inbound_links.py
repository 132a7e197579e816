"""Decode's end of links: who may open one, and whose payload is whose."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
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
from cluster.kv.transport.link import Link
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
        max_ctas: int | None,
        staging: Staging,
    ) -> None:
        self._signer = signer
        self._terms = terms
        self._device = device
        self._stuck_seconds = stuck_seconds
        self._max_ctas = max_ctas
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
        link = Link(hello.unique_id, 1, self._device, self._stuck_seconds, self._max_ctas)
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
