"""Promise I3, ends: a request is cancelled, refused or loses its peer in every state, on either
side; both ledgers return to 0 and each engine is told exactly once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from cluster.ticket import Ticket
from tests.handoff.agents import TOKENS, Decode, Prefill, make_ticket, sign
from tests.handoff.raw import landed


@dataclass
class Handoff:
    """One request of two blocks on its way through both engines."""

    prefill: Prefill
    decode: Decode
    ticket: Ticket
    wire: bytes
    offered: bool = False
    reserved: bool = False

    async def arrive(self) -> None:
        self.prefill.arrive(self.ticket, self.wire, self.decode.agent.address)

    async def reserve(self) -> None:
        self.reserved = True
        self.decode.reserve(self.ticket, self.wire, (5, 6))

    async def granted(self) -> None:
        """Prefill has heard of the reservation."""
        await self.prefill.until(
            lambda: self.ticket.handoff_id in self.prefill.agent.mailbox.take_granted()
        )

    async def compute_first(self) -> None:
        self.offered = True
        self.prefill.compute(self.ticket, (1,))

    async def first_landed(self) -> None:
        await self.decode.until(lambda: self.decode.frames(self.ticket) > 0)

    async def compute_last(self) -> None:
        frames = self.decode.frames(self.ticket)
        self.prefill.compute(self.ticket, (2,), first=1)
        if self.reserved:
            await self.decode.until(lambda: self.decode.frames(self.ticket) > frames)

    async def release(self) -> None:
        self.prefill.release(self.ticket, token=42)

    async def acknowledged(self) -> None:
        assert (await self.decode.result(self.ticket.handoff_id)).ok
        assert (await self.prefill.result(self.ticket.handoff_id)).ok


Step = Callable[[Handoff], Awaitable[None]]
STATES: dict[str, list[Step]] = {
    "before anything": [],
    "prefill knows it": [Handoff.arrive],
    "decode has reserved, prefill does not know it": [Handoff.reserve],
    "granted, nothing computed": [Handoff.arrive, Handoff.reserve, Handoff.granted],
    "computed ahead of the grant": [Handoff.arrive, Handoff.compute_first],
    "all computed ahead of the grant": [
        Handoff.arrive, Handoff.compute_first, Handoff.compute_last, Handoff.release,
    ],
    "half of it landed": [
        Handoff.arrive, Handoff.reserve, Handoff.compute_first, Handoff.first_landed,
    ],
    "all of it landed, not committed": [
        Handoff.arrive, Handoff.reserve, Handoff.compute_first, Handoff.first_landed,
        Handoff.compute_last,
    ],
    "committed": [
        Handoff.arrive, Handoff.reserve, Handoff.compute_first, Handoff.first_landed,
        Handoff.compute_last, Handoff.release,
    ],
    "acknowledged": [
        Handoff.arrive, Handoff.reserve, Handoff.compute_first, Handoff.first_landed,
        Handoff.compute_last, Handoff.release, Handoff.acknowledged,
    ],
}  # fmt: skip


@pytest.fixture(params=STATES)
async def handoff(request: pytest.FixtureRequest, prefill: Prefill, decode: Decode) -> Handoff:
    """In each state."""
    ticket = make_ticket(2 * TOKENS, seconds=30)
    handoff = Handoff(prefill, decode, ticket, sign(ticket))
    for step in STATES[request.param]:
        await step(handoff)
    return handoff


async def all_let_go(handoff: Handoff) -> None:
    """Both ledgers are at 0, each engine has heard once (`Side.step` asserts that), and what did
    land is whole."""
    prefill, decode, handoff_id = handoff.prefill, handoff.decode, handoff.ticket.handoff_id
    if handoff.offered:
        await prefill.until(lambda: prefill.finished.sending == {f"p-{handoff_id}"})
    if handoff.reserved:
        await decode.until(lambda: decode.finished.recving == {f"d-{handoff_id}"})
        if (await decode.result(handoff_id)).ok:
            assert landed(prefill, decode, (1, 2), (5, 6))
            assert not decode.finished.failed
        else:
            assert decode.finished.failed == {f"d-{handoff_id}"}
    assert (prefill.pinned(), decode.pinned()) == (0, 0)
    await prefill.until(lambda: not prefill.agent.sender._handoffs)
    assert not decode.agent.receiver._reservations
    assert decode.agent.pins().leaked_blocks == prefill.agent.pins().leaked_blocks == 0


def end_prefill(handoff: Handoff) -> None:
    """Its engine is done with the request, if it was not before."""
    handoff.prefill.release(handoff.ticket, token=None)


async def test_aborted_on_prefill(handoff: Handoff) -> None:
    end_prefill(handoff)
    if handoff.reserved:  # where prefill never came, the router tells decode
        handoff.decode.release(handoff.ticket)
    await all_let_go(handoff)


async def test_aborted_on_decode(handoff: Handoff) -> None:
    handoff.decode.release(handoff.ticket)
    await all_of_prefill(handoff)


async def ended_on_prefill(handoff: Handoff) -> None:
    """If the push was under way it has ended, and well only where decode had it all verified."""
    handoff_id = handoff.ticket.handoff_id
    if handoff_id in handoff.prefill.agent.sender._handoffs:
        result = await handoff.prefill.result(handoff_id)
        handoff.decode.step()
        assert result.error or handoff.decode.results[handoff_id].ok


async def all_of_prefill(handoff: Handoff) -> None:
    """Prefill's push has ended by decode's word alone; its engine finds out and lets go."""
    await ended_on_prefill(handoff)
    end_prefill(handoff)
    await all_let_go(handoff)


async def test_aborted_on_both_at_once(handoff: Handoff) -> None:
    handoff.decode.release(handoff.ticket)
    end_prefill(handoff)
    await all_let_go(handoff)


async def test_preempted_on_prefill(handoff: Handoff) -> None:
    """The engine takes the blocks back; the request itself ends when the router hears."""
    sender, handoff_id = handoff.prefill.agent.sender, handoff.ticket.handoff_id
    handoff.prefill.agent.post(lambda: sender.fail(handoff_id))
    if handoff.reserved:
        handoff.decode.release(handoff.ticket)
    end_prefill(handoff)
    await all_let_go(handoff)


async def test_prefill_dies(handoff: Handoff) -> None:
    handoff.prefill.step()
    handoff.prefill.agent.stop()
    decode, handoff_id = handoff.decode, handoff.ticket.handoff_id
    decode.release(handoff.ticket)
    if handoff.reserved:
        await decode.until(lambda: decode.finished.recving == {f"d-{handoff_id}"})
    assert decode.pinned() == 0


async def test_decode_dies(handoff: Handoff) -> None:
    handoff.decode.step()
    handoff.decode.agent.stop()
    prefill, handoff_id = handoff.prefill, handoff.ticket.handoff_id
    await ended_on_prefill(handoff)
    end_prefill(handoff)
    if handoff.offered:
        await prefill.until(lambda: prefill.finished.sending == {f"p-{handoff_id}"})
    assert prefill.pinned() == 0


async def test_prefill_refused_after_decode_reserved(prefill: Prefill, decode: Decode) -> None:
    """Prefill's plan fails before anything crosses: the addresses do not fit the geometry."""
    ticket = make_ticket(2 * TOKENS, seconds=30)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.arrive(ticket, wire, decode.agent.address, decode.agent.address)
    refusal = (await prefill.result(ticket.handoff_id)).error
    assert refusal == "the decode worker has 1 ranks and 2 addresses"
    prefill.release(ticket, token=None)
    decode.release(ticket)  # the router passes it on
    assert "cancelled" in (await decode.result(ticket.handoff_id)).error
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    assert (prefill.pinned(), decode.pinned()) == (0, 0)
    assert not prefill.finished.sending  # nothing was pinned: there is nothing to free


async def test_decode_refused_after_prefill_started(prefill: Prefill, decode: Decode) -> None:
    """Decode ends the request before it took blocks; prefill is at work on it."""
    ticket = make_ticket(2 * TOKENS, seconds=30)
    prefill.offer(ticket, sign(ticket), decode.agent.address, (1, 2))
    await prefill.until(lambda: prefill.pinned() > 0)
    decode.release(ticket)
    assert (await prefill.result(ticket.handoff_id)).error
    prefill.release(ticket, token=42)
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)
