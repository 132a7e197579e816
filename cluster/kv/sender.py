"""Prefill's side of handoffs: ask for the grant, pin, push layer by layer, let go.

Lives on the handoff agent's event loop and is touched by no other thread. A handoff begins when its
request arrives at the engine, so that the grant is there by the time there is something to send.
Blocks stay pinned until two things have happened, in either order: the engine is done with the
request, and every push has ended – acknowledged, refused, cancelled or out of time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster.errors import HandoffRefused
from cluster.kv.generations import Generations, Stamp
from cluster.kv.geometry import KvGeometry, routes, same_blocks
from cluster.kv.handoff import HandoffParams
from cluster.kv.ledger import Ledger, LedgerEntry
from cluster.kv.mailbox import Mailbox
from cluster.kv.milestones import Fence, Milestones
from cluster.kv.orders import Order, Ready, leaves_behind, result_of
from cluster.kv.paged import PagedCache
from cluster.kv.push import Push
from cluster.kv.transport.seam import Peer, Transport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrival:
    """A prompt that is to be handed off has come to the engine."""

    request: str
    params: HandoffParams


@dataclass(frozen=True)
class Offer:
    """A prefill step completes more blocks of a prompt.

    Attributes:
        first_block: index in the prompt of the first of `block_ids`.
        last: the step completes the prompt.
    """

    handoff_id: str
    first_block: int
    block_ids: tuple[int, ...]
    last: bool


@dataclass(frozen=True)
class Release:
    """The engine is done with a request.

    Attributes:
        first_token_id: decode goes on after it; None if there is nothing to go on with.
    """

    handoff_id: str
    first_token_id: int | None


@dataclass
class _Handoff:
    arrival: Arrival
    expires: float
    pushes: list[Push] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    pinned: bool = False
    granted: bool = False
    released: bool = False
    ended: bool = False

    @property
    def id(self) -> str:
        return self.arrival.params.handoff_id


class Sender:
    """Pushes the handoffs of one engine rank.

    Args:
        geometry, rank: of this engine, and this rank of it.
    """

    def __init__(
        self,
        cache: PagedCache,
        generations: Generations,
        ledger: Ledger,
        mailbox: Mailbox,
        transport: Transport,
        geometry: KvGeometry,
        rank: int,
    ) -> None:
        self._cache = cache
        self._generations = generations
        self._ledger = ledger
        self._mailbox = mailbox
        self._transport = transport
        self._geometry = geometry
        self._rank = rank
        self._handoffs: dict[str, _Handoff] = {}
        self._milestones = Milestones("kv-computed", cache.device)

    # ---- the engine's side -------------------------------------------------------------------

    def arrive(self, arrival: Arrival) -> None:
        """Asks decode for room."""
        expires = time.monotonic() + arrival.params.expires_in
        handoff = self._handoffs[arrival.params.handoff_id] = _Handoff(arrival, expires)
        refusal = None
        try:
            handoff.pushes = self._plan(handoff)
        except HandoffRefused as refused:
            refusal = refused
        handoff.task = asyncio.create_task(self._run(handoff, refusal))
        handoff.task.add_done_callback(lambda task: self._ended(handoff, task))

    def offer(self, offer: Offer) -> None:
        """Blocks of `offer` are pinned from now on; their layers follow by `layer_ready`."""
        handoff = self._handoffs.get(offer.handoff_id)
        if handoff is None:
            return
        blocks, size = len(offer.block_ids), self._size(offer)
        now = time.monotonic()
        if handoff.pinned:
            self._ledger.grow(handoff.id, blocks, size, now)
        else:
            handoff.pinned = True
            entry = LedgerEntry(handoff.id, "sending", blocks, size, handoff.expires)
            self._ledger.pin(entry, now)

    def _size(self, offer: Offer) -> int:
        """Bytes of all layers."""
        return len(offer.block_ids) * self._cache.block_bytes * self._cache.num_layers

    def layer_ready(
        self,
        layer: int,
        offers: tuple[tuple[Offer, Stamp], ...],
        fence: Fence | None = None,
    ) -> None:
        """The step's blocks of a layer have been written by the engine once `fence` is reached."""
        for offer, stamp in offers:
            handoff = self._handoffs.get(offer.handoff_id)
            if handoff is not None and not handoff.ended:
                due = leaves_behind(layer, self._cache.num_layers, self._size(offer), offer.last)
                ready = Ready(layer, offer.first_block, offer.block_ids, stamp, fence, due)
                for push in handoff.pushes:
                    push.add(ready)

    def release(self, release: Release) -> None:
        """The engine is done with the request; without a first token the push is called off."""
        handoff = self._handoffs.get(release.handoff_id)
        if handoff is None:
            return
        handoff.released = True
        if release.first_token_id is None:
            self._call_off(handoff)
        else:
            for push in handoff.pushes:
                push.finish(release.first_token_id)
        self._let_go(handoff)

    def fail(self, handoff_id: str) -> None:
        """The engine took the blocks back (a preemption): nothing more may be read from them."""
        if handoff := self._handoffs.get(handoff_id):
            self._call_off(handoff)

    def when_read(self, handoff_ids: Iterable[str], call: Callable[[], None]) -> None:
        """Calls it once what was offered of these handoffs so far has been read, or never will."""
        handoffs = [h for i in handoff_ids if (h := self._handoffs.get(i)) and not h.ended]
        pushes = [push for handoff in handoffs for push in handoff.pushes]
        left = len(pushes)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if not left:
                call()

        for push in pushes:
            push.when_read(one_less)
        if not pushes:
            call()

    def fail_unread(self, handoff_ids: Iterable[str]) -> None:
        """What was to be read by now, and has not been, will never be sent."""
        for handoff_id in handoff_ids:
            handoff = self._handoffs.get(handoff_id)
            if handoff is not None and any(push.unread for push in handoff.pushes):
                log.warning("handoff %s is called off: decode takes it too slowly", handoff_id)
                self._call_off(handoff)

    def live(self) -> set[str]:
        """Handoffs that pin blocks."""
        return {handoff.id for handoff in self._handoffs.values() if handoff.pinned}

    # ---- the pushes --------------------------------------------------------------------------

    def _call_off(self, handoff: _Handoff) -> None:
        for push in handoff.pushes:
            push.clear()
        if handoff.task is not None:
            handoff.task.cancel()

    async def _run(self, handoff: _Handoff, refusal: HandoffRefused | None) -> None:
        """Raises HandoffRefused with the first failure of any route."""
        if refusal is not None:
            raise refusal
        try:
            async with asyncio.timeout(handoff.arrival.params.expires_in):
                async with asyncio.TaskGroup() as group:
                    for push in handoff.pushes:
                        group.create_task(push.run())
        except TimeoutError:
            raise HandoffRefused("the lease ran out before decode had taken every block") from None
        except ExceptionGroup as failures:
            refusals = failures.subgroup(HandoffRefused)
            if refusals is None:
                log.exception("handoff %s broke", handoff.id)
                raise HandoffRefused("the transfer broke") from failures
            raise _first(refusals) from None

    def _plan(self, handoff: _Handoff) -> list[Push]:
        params = handoff.arrival.params
        theirs = KvGeometry.parse(params.peer_geometry)
        if len(params.peers) != theirs.ranks:
            raise HandoffRefused(
                f"the decode worker has {theirs.ranks} ranks and {len(params.peers)} addresses"
            )
        pushes = []
        for route in routes(self._geometry, theirs):
            if route.prefill_rank != self._rank:
                continue
            rank = route.decode_rank
            peer = Peer(params.peers[rank], params.peer_worker, params.peer_incarnation, rank)
            order = Order(
                handoff.id,
                params.ticket,
                params.num_tokens,
                route,
                peer,
                plain=not same_blocks(self._geometry, theirs),
            )
            pushes.append(
                Push(
                    order,
                    self._cache,
                    self._generations,
                    self._transport,
                    lambda: self._granted(handoff),
                    self._milestones,
                )
            )
        return pushes

    def _granted(self, handoff: _Handoff) -> None:
        """Decode holds all of the request's blocks once any of its ranks does."""
        if not handoff.granted:
            handoff.granted = True
            self._mailbox.granted(handoff.id)
            self._ledger.note(handoff.id, "granted", time.monotonic())

    def _ended(self, handoff: _Handoff, task: asyncio.Task[None]) -> None:
        """Runs however the push ended, also when it was cancelled before its first step."""
        if task.cancelled():
            error = "the request was cancelled"
        else:
            failure = task.exception()
            error = str(failure) if failure else ""
        handoff.ended = True
        for push in handoff.pushes:
            push.clear()
        self._ledger.note(handoff.id, f"push ended: {error or 'acknowledged'}", time.monotonic())
        sent = [push.sent for push in handoff.pushes]
        self._mailbox.result(result_of(handoff.id, sent, error))
        self._let_go(handoff)

    def _let_go(self, handoff: _Handoff) -> None:
        """Unpins once both sides of the engine and the wire are done."""
        if handoff.ended and handoff.released:
            del self._handoffs[handoff.id]
            if handoff.pinned:
                self._ledger.unpin(handoff.id)
                self._mailbox.sent(handoff.arrival.request)


def _first(group: ExceptionGroup[HandoffRefused]) -> HandoffRefused:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, ExceptionGroup) else inner
