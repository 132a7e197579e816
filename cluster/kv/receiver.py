"""Decode's side of handoffs: reserve, grant, verify, land.

Lives on the handoff agent's event loop and is touched by no other thread. A payload is written into
a block only while its reservation stands and the blocks are still of the generation that was
reserved, and blocks are given back only when no write is under way; so a cancelled request's blocks
are never written after they have been given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from cluster.errors import HandoffRefused
from cluster.kv.assembly import Assembly
from cluster.kv.doorkeeper import Admitted, Doorkeeper
from cluster.kv.first_token import FirstTokens
from cluster.kv.generations import Generations, Stamp
from cluster.kv.landing import Landing
from cluster.kv.ledger import Ledger, LedgerEntry
from cluster.kv.mailbox import Mailbox
from cluster.kv.milestones import Fence
from cluster.kv.paged import PagedCache
from cluster.kv.reservation import LATE, CalledOff, Reservation, Reserve
from cluster.kv.seldom import Seldom
from cluster.kv.transport.frames import Abort, Ack, Blocks, Coming, Commit, Grant, Open, Refused
from cluster.kv.transport.seam import Inbound

log = logging.getLogger(__name__)

OPEN_TIMEOUT_SECONDS = 10.0
READ_OFF_SECONDS = 1.0


class Receiver:
    """Takes handoffs for one engine rank.

    Args:
        doorkeeper: judges what a push shows first.
        vocab_size: first tokens are below it.
    """

    def __init__(
        self,
        cache: PagedCache,
        generations: Generations,
        ledger: Ledger,
        mailbox: Mailbox,
        doorkeeper: Doorkeeper,
        first_tokens: FirstTokens,
        vocab_size: int,
    ) -> None:
        self._cache = cache
        self._generations = generations
        self._ledger = ledger
        self._mailbox = mailbox
        self._doorkeeper = doorkeeper
        self._first_tokens = first_tokens
        self._vocab_size = vocab_size
        self._strangers = Seldom(log)
        self._reservations: dict[str, Reservation] = {}
        self._arrivals: dict[str, list[asyncio.Event]] = {}

    # ---- the engine's side -------------------------------------------------------------------

    def reserve(self, reserve: Reserve, stamp: Stamp, free: Fence | None = None) -> None:
        """Blocks, of the generations in `stamp`, have been taken: the pushes may begin.

        Args:
            free: behind every step that may still write to the blocks for whom they were before.
        """
        now = time.monotonic()
        owed = -(-(reserve.num_tokens - reserve.held_tokens) // self._cache.tokens)
        size = owed * self._cache.block_bytes * self._cache.num_layers
        self._ledger.pin(
            LedgerEntry(reserve.handoff_id, "reserved", owed, size, now + reserve.expires_in), now
        )
        loop = asyncio.get_running_loop()
        self._reservations[reserve.handoff_id] = Reservation(
            reserve,
            stamp,
            loop.call_later(reserve.expires_in, self._expire, reserve.handoff_id),
            granted_at=now,
            owed_blocks=owed,
            free=free,
        )
        self._announce(reserve.handoff_id)

    def release(self, handoff_id: str) -> None:
        """The request has ended in the engine: nothing may be written for it any more."""
        self._first_tokens.forget(handoff_id)
        self._doorkeeper.close(handoff_id)
        self._announce(handoff_id)
        self._fail(handoff_id, "the request was cancelled")

    def live(self) -> set[str]:
        """Handoffs that hold a reservation."""
        return set(self._reservations)

    def _announce(self, handoff_id: str) -> None:
        for arrival in self._arrivals.get(handoff_id, ()):
            arrival.set()

    # ---- the peer's side ---------------------------------------------------------------------

    async def serve(self, inbound: Inbound) -> None:
        """One push, from its first frame to its end. Never raises for what a peer does."""
        handoff_id = ""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_SECONDS):
                opening = await inbound.receive()
            if opening is None:
                return
            if not isinstance(opening, Open):
                raise HandoffRefused("a push must begin with a ticket")
            admitted = self._doorkeeper.admit(opening.ticket, opening.rank)
            inbound.claim(admitted.ticket.handoff_id)
            reservation = await self._reserved(admitted, opening)
            handoff_id = admitted.ticket.handoff_id
            part = self._part(reservation, admitted)
            await inbound.send(Grant(reservation.reserve.held_tokens, part.owed))
            landing = Landing(
                inbound,
                reservation,
                admitted,
                part,
                self._cache,
                self._generations,
                self._give_back,
            )
            async with reservation.push(admitted.ticket.expires_at - time.time()):
                await self._take(landing, inbound)
            handoff_id = ""  # this part is done: a peer that leaves now takes nothing with it
            await inbound.send(Ack())
        except HandoffRefused as refusal:
            if isinstance(refusal, CalledOff):
                log.info("handoff %s refused: %s", handoff_id, refusal)
            elif handoff_id:
                log.warning("handoff %s refused: %s", handoff_id, refusal)
            else:
                self._strangers.warning("a push refused: %s", refusal)
            self._fail(handoff_id, str(refusal))
            await inbound.send(Refused(str(refusal)))
            if handoff_id:
                await _read_off(inbound)
        except TimeoutError:
            self._strangers.warning("a push showed no ticket within %.0f s", OPEN_TIMEOUT_SECONDS)
        except BaseException:
            self._fail(handoff_id, "the transfer broke")
            raise
        finally:
            inbound.close()

    async def _reserved(self, admitted: Admitted, opening: Open) -> Reservation:
        """Waits for the engine to take blocks, no longer than the ticket lives."""
        handoff_id = admitted.ticket.handoff_id
        if handoff_id not in self._reservations and not self._doorkeeper.closed(handoff_id):
            arrival = asyncio.Event()
            waiting = self._arrivals.setdefault(handoff_id, [])
            waiting.append(arrival)
            try:
                async with asyncio.timeout(admitted.ticket.expires_at - time.time()):
                    await arrival.wait()
            except TimeoutError:
                raise HandoffRefused("decode had no room within the ticket's life") from None
            finally:
                waiting.remove(arrival)
                if not waiting:
                    self._arrivals.pop(handoff_id, None)
        reservation = self._reservations.get(handoff_id)
        if reservation is None or reservation.error:
            raise CalledOff("the request was cancelled")
        if reservation.reserve.ticket.encode() != opening.ticket:
            raise HandoffRefused("the push shows another ticket than the request")
        return reservation

    def _part(self, reservation: Reservation, admitted: Admitted) -> Assembly:
        """What this route owes; every route's is made with the first."""
        reserve, tokens = reservation.reserve, admitted.prefill.tokens
        if not reservation.parts:
            for route in admitted.routes:
                reservation.parts[route.prefill_rank] = Assembly(
                    self._cache.num_layers,
                    reserve.held_tokens // tokens,
                    -(-reserve.num_tokens // tokens),
                    route.target.count * tokens * self._cache.content * self._cache.item_bytes,
                )
        return reservation.parts[admitted.route.prefill_rank]

    async def _take(self, landing: Landing, inbound: Inbound) -> None:
        while (frame := await inbound.receive()) is not None:
            match frame:
                case Blocks() | Coming():
                    await landing.land(frame)
                case Commit():
                    await landing.complete(frame)
                    return self._commit(landing, frame)
                case Abort(reason):
                    raise HandoffRefused(f"prefill gave up: {reason}")
                case _:
                    raise HandoffRefused("a second ticket on one push")
        raise CalledOff("prefill stopped half-way")

    def _commit(self, landing: Landing, commit: Commit) -> None:
        """Everything of this route has landed and was verified."""
        reservation = landing.reservation
        reserve = reservation.reserve
        if commit.num_tokens != reserve.num_tokens:
            raise HandoffRefused(f"committed {commit.num_tokens} of {reserve.num_tokens} tokens")
        if commit.first_token_id >= self._vocab_size:
            raise HandoffRefused(f"first token {commit.first_token_id} is not in the vocabulary")
        if reservation.first_token not in (None, commit.first_token_id):
            raise HandoffRefused("prefill's ranks do not agree on the first token")
        reservation.first_token = commit.first_token_id
        reservation.transport = landing.inbound.transport
        reservation.committed.add(landing.admitted.route.prefill_rank)
        if reservation.whole:
            self._first_tokens.put(reserve.handoff_id, commit.first_token_id)
            self._end(reservation, error="")

    # ---- ends --------------------------------------------------------------------------------

    def _expire(self, handoff_id: str) -> None:
        self._fail(handoff_id, LATE)

    def _fail(self, handoff_id: str, reason: str) -> None:
        reservation = self._reservations.get(handoff_id)
        if reservation is not None and not reservation.error:
            self._end(reservation, error=reason)

    def _end(self, reservation: Reservation, error: str) -> None:
        reservation.end(error)
        self._give_back(reservation)

    def _give_back(self, reservation: Reservation) -> None:
        """Once no write is under way, the blocks are the engine's again, verified or discarded."""
        if reservation.writing:
            return
        reserve = reservation.reserve
        if self._reservations.pop(reserve.handoff_id, None) is None:
            return
        self._ledger.unpin(reserve.handoff_id)
        self._mailbox.result(reservation.result(time.monotonic()))
        landed = None if reservation.error else reservation.first_token
        self._mailbox.received(reserve.request, landed)


async def _read_off(inbound: Inbound) -> None:
    """Lets a sender that is still writing get to read its refusal."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_OFF_SECONDS):
            while True:
                with contextlib.suppress(HandoffRefused):
                    frame = await inbound.receive()
                    if frame is None or isinstance(frame, Commit):
                        return
                    if isinstance(frame, Blocks):
                        inbound.done(frame)
