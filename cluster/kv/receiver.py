"""Decode's side of handoffs: reserve, grant, verify, land.

Lives on the handoff agent's event loop and is touched by no other thread. A payload is written into
a block only while its reservation stands, in the same loop turn as that is checked, so a cancelled
request's blocks are never written after they have been given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from cluster.errors import HandoffRefused
from cluster.kv.assembly import Assembly
from cluster.kv.first_token import FirstTokens
from cluster.kv.handoff import HandoffResult
from cluster.kv.ledger import Ledger, LedgerEntry
from cluster.kv.mailbox import Mailbox
from cluster.kv.paged import PagedCache, checksum
from cluster.kv.transport.frames import Abort, Ack, Blocks, Commit, Grant, Open, Refused
from cluster.kv.transport.seam import Inbound
from cluster.ticket import Ticket, TicketSigner

log = logging.getLogger(__name__)

OPEN_TIMEOUT_SECONDS = 10.0
READ_OFF_SECONDS = 1.0


@dataclass(frozen=True)
class Reserve:
    """The engine took blocks for a request and waits for its KV.

    Attributes:
        block_ids: of the whole prompt, in order.
        held_blocks: the first of them, already filled from the prefix cache.
        expires_in: seconds until the reservation is given up.
    """

    request: str
    handoff_id: str
    ticket: str
    num_tokens: int
    block_ids: tuple[int, ...]
    held_blocks: int
    expires_in: float


@dataclass
class _Reservation:
    reserve: Reserve
    assembly: Assembly
    expiry: asyncio.TimerHandle
    granted_at: float
    first_frame_at: float = 0.0
    last_frame_at: float = 0.0


@dataclass(frozen=True)
class Terms:
    """What this engine rank is; pushes for anything else are refused.

    Attributes:
        layout: fingerprint of its KV layout.
    """

    worker_id: str
    incarnation: str
    layout: str
    rank: int
    vocab_size: int


class _CalledOff(HandoffRefused):
    """Refused because the request has ended meanwhile, as when a client goes away."""


class Receiver:
    """Takes handoffs for one engine rank.

    Args:
        terms: what a push must be for.
    """

    def __init__(
        self,
        cache: PagedCache,
        ledger: Ledger,
        mailbox: Mailbox,
        signer: TicketSigner,
        first_tokens: FirstTokens,
        terms: Terms,
    ) -> None:
        self._cache = cache
        self._ledger = ledger
        self._mailbox = mailbox
        self._signer = signer
        self._first_tokens = first_tokens
        self._terms = terms
        self._reservations: dict[str, _Reservation] = {}
        self._arrivals: dict[str, asyncio.Event] = {}
        self._spent: dict[str, float] = {}

    # ---- the engine's side -------------------------------------------------------------------

    def reserve(self, reserve: Reserve) -> None:
        """Blocks have been taken: the push may begin."""
        loop = asyncio.get_running_loop()
        owed = len(reserve.block_ids) - reserve.held_blocks
        size = owed * self._cache.block_bytes * self._cache.num_layers
        self._ledger.pin(
            LedgerEntry(
                reserve.handoff_id, "reserved", owed, size, time.monotonic() + reserve.expires_in
            )
        )
        self._reservations[reserve.handoff_id] = _Reservation(
            reserve,
            Assembly(
                self._cache.num_layers,
                reserve.held_blocks,
                len(reserve.block_ids),
                self._cache.block_bytes,
            ),
            loop.call_later(reserve.expires_in, self._expire, reserve.handoff_id),
            granted_at=time.monotonic(),
        )
        if arrival := self._arrivals.get(reserve.handoff_id):
            arrival.set()

    def release(self, handoff_id: str) -> None:
        """The request has ended in the engine: nothing may be written for it any more."""
        self._first_tokens.forget(handoff_id)
        self._spent.setdefault(handoff_id, time.monotonic() + 3600)
        if arrival := self._arrivals.get(handoff_id):
            arrival.set()
        if self._reservations.get(handoff_id):
            self._end(handoff_id, error="the request was cancelled")

    def live(self) -> set[str]:
        """Handoffs that hold a reservation."""
        return set(self._reservations)

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
            ticket = self._admit(opening)
            reservation = await self._reserved(ticket, opening)
            handoff_id = ticket.handoff_id
            await inbound.send(Grant(reservation.reserve.held_blocks, self._owed(reservation)))
            await self._take(inbound, handoff_id)
            await inbound.send(Ack())
        except HandoffRefused as refusal:
            level = logging.INFO if isinstance(refusal, _CalledOff) else logging.WARNING
            log.log(level, "handoff %s refused: %s", handoff_id or "(unknown)", refusal)
            self._fail(handoff_id, str(refusal))
            await inbound.send(Refused(str(refusal)))
            if handoff_id:
                await _read_off(inbound)
        except TimeoutError:
            log.warning("a push showed no ticket within %.0f s", OPEN_TIMEOUT_SECONDS)
        except BaseException:
            self._fail(handoff_id, "the transfer broke")
            raise

    def _admit(self, opening: Open) -> Ticket:
        ticket = self._signer.verify(opening.ticket, time.time())
        me = (self._terms.worker_id, self._terms.incarnation)
        if (ticket.decode_worker, ticket.decode_incarnation) != me:
            raise HandoffRefused("the ticket is for another worker or another life of this one")
        if opening.rank != self._terms.rank:
            raise HandoffRefused(f"rank {opening.rank} pushes to rank {self._terms.rank}")
        if ticket.layout != self._terms.layout:
            raise HandoffRefused("the ticket is for another KV layout")
        now = time.monotonic()
        self._spent = {key: until for key, until in self._spent.items() if until > now}
        if ticket.handoff_id in self._spent:
            raise HandoffRefused("the ticket has been used")
        self._spent[ticket.handoff_id] = now + max(ticket.expires_at - time.time(), 0) + 60
        return ticket

    async def _reserved(self, ticket: Ticket, opening: Open) -> _Reservation:
        """Waits for the engine to take blocks, no longer than the ticket lives."""
        handoff_id = ticket.handoff_id
        if handoff_id not in self._reservations:
            arrival = self._arrivals[handoff_id] = asyncio.Event()
            try:
                async with asyncio.timeout(ticket.expires_at - time.time()):
                    await arrival.wait()
            except TimeoutError:
                raise HandoffRefused("decode had no room within the ticket's life") from None
            finally:
                del self._arrivals[handoff_id]
        reservation = self._reservations.get(handoff_id)
        if reservation is None:
            raise _CalledOff("the request was cancelled")
        if reservation.reserve.ticket.encode() != opening.ticket:
            raise HandoffRefused("the push shows another ticket than the request")
        return reservation

    async def _take(self, inbound: Inbound, handoff_id: str) -> None:
        while (frame := await inbound.receive()) is not None:
            reservation = self._reservations.get(handoff_id)
            if reservation is None:
                raise _CalledOff("the request has ended")
            match frame:
                case Blocks():
                    self._land(reservation, frame)
                case Commit():
                    return self._commit(reservation, frame)
                case Abort(reason):
                    raise HandoffRefused(f"prefill gave up: {reason}")
                case _:
                    raise HandoffRefused("a second ticket on one push")
        raise _CalledOff("prefill stopped half-way")

    def _land(self, reservation: _Reservation, frame: Blocks) -> None:
        run, payload = frame.run, frame.payload
        reservation.assembly.check(run, len(payload))
        if checksum(payload, reservation.reserve.handoff_id) != run.checksum:
            raise HandoffRefused(f"frame {run.sequence}: checksum differs")
        last = run.first_block + run.num_blocks
        self._cache.scatter(
            run.layer, reservation.reserve.block_ids[run.first_block : last], payload
        )
        reservation.assembly.accept(run, len(payload))
        reservation.last_frame_at = time.monotonic()
        reservation.first_frame_at = reservation.first_frame_at or reservation.last_frame_at

    def _commit(self, reservation: _Reservation, commit: Commit) -> None:
        assembly, reserve = reservation.assembly, reservation.reserve
        if commit.frames != assembly.frames or not assembly.complete:
            raise HandoffRefused("prefill committed before every block had arrived")
        if commit.num_tokens != reserve.num_tokens:
            raise HandoffRefused(f"committed {commit.num_tokens} of {reserve.num_tokens} tokens")
        if commit.first_token_id >= self._terms.vocab_size:
            raise HandoffRefused(f"first token {commit.first_token_id} is not in the vocabulary")
        self._first_tokens.put(reserve.handoff_id, commit.first_token_id)
        self._end(reserve.handoff_id, error="")

    # ---- ends --------------------------------------------------------------------------------

    def _expire(self, handoff_id: str) -> None:
        self._fail(handoff_id, "the lease ran out before every block had arrived")

    def _fail(self, handoff_id: str, reason: str) -> None:
        if handoff_id in self._reservations:
            self._end(handoff_id, error=reason)

    def _end(self, handoff_id: str, error: str) -> None:
        reservation = self._reservations.pop(handoff_id)
        reservation.expiry.cancel()
        self._ledger.unpin(handoff_id)
        self._mailbox.result(_result(reservation, self._cache.tokens, error))
        self._mailbox.received(reservation.reserve.request, failed=bool(error))

    def _owed(self, reservation: _Reservation) -> int:
        owed = len(reservation.reserve.block_ids) - reservation.reserve.held_blocks
        return owed * self._cache.block_bytes * self._cache.num_layers


async def _read_off(inbound: Inbound) -> None:
    """Lets a sender that is still writing get to read its refusal."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READ_OFF_SECONDS):
            while True:
                with contextlib.suppress(HandoffRefused):
                    if await inbound.receive() is None:
                        return


def _result(reservation: _Reservation, tokens_per_block: int, error: str) -> HandoffResult:
    reserve, assembly = reservation.reserve, reservation.assembly
    return HandoffResult(
        handoff_id=reserve.handoff_id,
        side="decode",
        error=error,
        bytes=assembly.bytes,
        frames=assembly.frames,
        blocks=len(reserve.block_ids) - reserve.held_blocks,
        held_tokens=reserve.held_blocks * tokens_per_block,
        granted_at=reservation.granted_at,
        first_frame_at=reservation.first_frame_at,
        last_frame_at=reservation.last_frame_at,
        ended_at=time.monotonic(),
    )
