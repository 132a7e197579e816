"""Prefill's side of handoffs: pin, wait for the grant, push layer by layer, let go.

Lives on the handoff agent's event loop and is touched by no other thread. Blocks stay pinned until
two things have happened, in either order: the engine is done with the request, and the push has
ended – acknowledged, refused, cancelled or out of time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.handoff import HandoffResult
from cluster.kv.ledger import Ledger, LedgerEntry
from cluster.kv.mailbox import Mailbox
from cluster.kv.paged import Fence, PagedCache, checksum
from cluster.kv.transport.frames import Ack, Blocks, Commit, Grant, Open, Refused, Reply
from cluster.kv.transport.seam import Outbound, Transport

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Offer:
    """A prefill step completed more blocks of a prompt.

    Attributes:
        first_block: index in the prompt of the first of `block_ids`.
        expires_in: seconds until the handoff is given up.
    """

    request: str
    handoff_id: str
    ticket: str
    peers: tuple[str, ...]
    num_tokens: int
    first_block: int
    block_ids: tuple[int, ...]
    expires_in: float


@dataclass(frozen=True)
class Release:
    """The engine is done with a request.

    Attributes:
        first_token_id: decode goes on after it; None if there is nothing to go on with.
    """

    handoff_id: str
    first_token_id: int | None


@dataclass(frozen=True)
class _Ready:
    layer: int
    first_block: int
    block_ids: tuple[int, ...]
    fence: Fence | None


@dataclass
class _Handoff:
    offer: Offer
    task: asyncio.Task[str] | None = None
    ready: deque[_Ready] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    release: Release | None = None
    ended: bool = False
    frames: int = 0
    bytes: int = 0
    granted_at: float = 0.0
    first_frame_at: float = 0.0
    last_frame_at: float = 0.0


class Sender:
    """Pushes the handoffs of one engine rank.

    Args:
        rank: this rank; pushes go to the same rank of the peer.
        max_message_bytes: largest frame payload; a frame carries one block at least.
    """

    def __init__(
        self,
        cache: PagedCache,
        ledger: Ledger,
        mailbox: Mailbox,
        transport: Transport,
        rank: int,
        max_message_bytes: int,
    ) -> None:
        self._cache = cache
        self._ledger = ledger
        self._mailbox = mailbox
        self._transport = transport
        self._rank = rank
        self._run_blocks = max(1, max_message_bytes // cache.block_bytes)
        self._handoffs: dict[str, _Handoff] = {}

    # ---- the engine's side -------------------------------------------------------------------

    def offer(self, offer: Offer) -> None:
        """Blocks of `offer` are pinned from now on; their layers follow by `layer_ready`."""
        handoff = self._handoffs.get(offer.handoff_id)
        size = len(offer.block_ids) * self._cache.block_bytes * self._cache.num_layers
        if handoff is None:
            expires = time.monotonic() + offer.expires_in
            self._ledger.pin(
                LedgerEntry(offer.handoff_id, "sending", len(offer.block_ids), size, expires)
            )
            handoff = self._handoffs[offer.handoff_id] = _Handoff(offer)
            handoff.task = asyncio.create_task(self._run(handoff))
            handoff.task.add_done_callback(partial(self._ended, handoff))
        else:
            self._ledger.grow(offer.handoff_id, len(offer.block_ids), size)

    def layer_ready(
        self, layer: int, offers: tuple[Offer, ...], fence: Fence | None = None
    ) -> None:
        """The step's blocks of a layer have been written by the engine once `fence` is reached."""
        for offer in offers:
            handoff = self._handoffs.get(offer.handoff_id)
            if handoff is not None and not handoff.ended:
                handoff.ready.append(_Ready(layer, offer.first_block, offer.block_ids, fence))
                handoff.changed.set()

    def release(self, release: Release) -> None:
        """The engine is done with the request; without a first token the push is called off."""
        handoff = self._handoffs.get(release.handoff_id)
        if handoff is None:
            return
        handoff.release = release
        handoff.changed.set()
        if release.first_token_id is None and handoff.task is not None:
            handoff.task.cancel()
        self._let_go(handoff)

    def fail(self, handoff_id: str) -> None:
        """The engine took the blocks back (a preemption): nothing more may be read from them."""
        handoff = self._handoffs.get(handoff_id)
        if handoff is not None and handoff.task is not None:
            handoff.ready.clear()
            handoff.task.cancel()

    def live(self) -> set[str]:
        """Handoffs that pin blocks."""
        return set(self._handoffs)

    # ---- the push ----------------------------------------------------------------------------

    async def _run(self, handoff: _Handoff) -> str:
        """Pushes; returns why it failed, or nothing."""
        try:
            async with asyncio.timeout(handoff.offer.expires_in):
                await self._push(handoff)
        except TimeoutError:
            return "the lease ran out before decode had taken every block"
        except HandoffRefused as refusal:
            return str(refusal)
        except Exception:
            log.exception("handoff %s broke", handoff.offer.handoff_id)
            return "the transfer broke"
        return ""

    def _ended(self, handoff: _Handoff, task: asyncio.Task[str]) -> None:
        """Runs however the push ended, also when it was cancelled before its first step."""
        error = "the request was cancelled" if task.cancelled() else task.result()
        handoff.ended = True
        handoff.ready.clear()
        self._mailbox.result(_result(handoff, error))
        self._let_go(handoff)

    async def _push(self, handoff: _Handoff) -> None:
        offer = handoff.offer
        if self._rank >= len(offer.peers):
            raise HandoffRefused(f"the decode worker has no rank {self._rank}")
        outbound = await self._transport.open(offer.peers[self._rank])
        try:
            await outbound.send(Open(offer.ticket.encode(), self._rank))
            grant = await outbound.receive()
            if not isinstance(grant, Grant):
                raise HandoffRefused(_refusal(grant))
            handoff.granted_at = time.monotonic()
            reply = asyncio.create_task(outbound.receive())
            try:
                await self._stream(handoff, grant, outbound, reply)
            except HandoffRefused:
                if reply.done() and not reply.exception():  # it knows better why
                    raise HandoffRefused(_refusal(reply.result())) from None
                raise
            finally:
                reply.cancel()
        finally:
            outbound.cancel()

    async def _stream(
        self, handoff: _Handoff, grant: Grant, outbound: Outbound, reply: asyncio.Task[Reply]
    ) -> None:
        """Sends what is ready until the engine is done, then commits and awaits the verdict."""
        while True:
            while handoff.ready:
                if reply.done():
                    raise HandoffRefused(_refusal(reply.result()))
                await self._send_ready(handoff, grant, outbound, handoff.ready.popleft())
            release = handoff.release
            if release is not None and release.first_token_id is not None:
                break
            handoff.changed.clear()
            changed = asyncio.create_task(handoff.changed.wait())
            try:
                await asyncio.wait({changed, reply}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
            if reply.done():
                raise HandoffRefused(_refusal(reply.result()))
        await outbound.send(
            Commit(handoff.frames, release.first_token_id, handoff.offer.num_tokens)
        )
        verdict = await reply
        if not isinstance(verdict, Ack):
            raise HandoffRefused(_refusal(verdict))

    async def _send_ready(
        self, handoff: _Handoff, grant: Grant, outbound: Outbound, ready: _Ready
    ) -> None:
        if ready.fence is not None:
            await asyncio.to_thread(ready.fence.synchronize)
        skip = max(0, grant.held_blocks - ready.first_block)
        for start in range(skip, len(ready.block_ids), self._run_blocks):
            ids = ready.block_ids[start : start + self._run_blocks]
            payload = self._cache.gather(ready.layer, ids)
            if handoff.bytes + len(payload) > grant.credit_bytes:
                raise HandoffRefused("decode granted less than the prompt needs")
            digest = checksum(payload, handoff.offer.handoff_id)
            first = ready.first_block + start
            run = BlockRun(handoff.frames, ready.layer, first, len(ids), digest)
            handoff.first_frame_at = handoff.first_frame_at or time.monotonic()
            await outbound.send(Blocks(run, payload))
            handoff.frames += 1
            handoff.bytes += len(payload)
            handoff.last_frame_at = time.monotonic()

    def _let_go(self, handoff: _Handoff) -> None:
        """Unpins once both sides of the engine and the wire are done."""
        if handoff.ended and handoff.release is not None:
            del self._handoffs[handoff.offer.handoff_id]
            self._ledger.unpin(handoff.offer.handoff_id)
            self._mailbox.sent(handoff.offer.request)


def _refusal(reply: Reply) -> str:
    return reply.reason if isinstance(reply, Refused) else "the decode worker broke the protocol"


def _result(handoff: _Handoff, error: str) -> HandoffResult:
    return HandoffResult(
        handoff_id=handoff.offer.handoff_id,
        side="prefill",
        error=error,
        bytes=handoff.bytes,
        frames=handoff.frames,
        granted_at=handoff.granted_at,
        first_frame_at=handoff.first_frame_at,
        last_frame_at=handoff.last_frame_at,
        ended_at=time.monotonic(),
    )
