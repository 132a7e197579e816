"""Promise I3: whatever ends a handoff, both sides' ledgers return to 0, and the engine is told to
free the blocks exactly once."""

from __future__ import annotations

import pytest

from cluster.kv.ledger import Ledger, LedgerEntry, LedgerError
from tests.handoff.agents import TOKENS, Decode, Prefill, make_ticket, sign

GONE = "127.0.0.1:1"


async def settled(prefill: Prefill) -> None:
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert prefill.pinned() == 0


async def test_blocks_stay_pinned_until_the_engine_is_done_and_the_push_has_ended(
    prefill: Prefill, decode: Decode
) -> None:
    ticket = make_ticket(TOKENS)
    wire = sign(ticket)
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    prefill.release(ticket, token=1)
    await prefill.until(lambda: prefill.pinned() > 0)
    assert not prefill.finished.sending  # decode has not taken them
    decode.reserve(ticket, wire, (1,))
    await settled(prefill)


async def test_a_push_that_fails_early_waits_for_the_engine(prefill: Prefill) -> None:
    ticket = make_ticket(TOKENS)
    prefill.offer(ticket, sign(ticket), GONE, (1,))
    result = await prefill.result(ticket.handoff_id)
    assert "cannot be reached" in result.error
    assert not prefill.finished.sending  # the request still runs: vLLM would not know it
    prefill.release(ticket, token=1)
    await settled(prefill)


async def test_a_request_cancelled_in_the_same_step_as_offered(
    prefill: Prefill, decode: Decode
) -> None:
    ticket = make_ticket(TOKENS)
    prefill.offer(ticket, sign(ticket), decode.agent.address, (1,))
    prefill.release(ticket, token=None)
    assert (await prefill.result(ticket.handoff_id)).error == "the request was cancelled"
    await settled(prefill)


async def test_a_prefill_cancelled_half_way_ends_decode_too(
    prefill: Prefill, decode: Decode
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (1, 2))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    prefill.release(ticket, token=None)
    await settled(prefill)
    assert (await decode.result(ticket.handoff_id)).error
    assert decode.finished.recving == decode.finished.failed == {f"d-{ticket.handoff_id}"}
    assert decode.pinned() == 0


async def test_a_preempted_prefill_is_called_off(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (1, 2))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    prefill.agent.post(lambda: prefill.agent.sender.fail(ticket.handoff_id))
    assert (await decode.result(ticket.handoff_id)).error
    prefill.release(ticket, token=None)
    await settled(prefill)


async def test_decode_that_never_reserves_costs_the_lease(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(TOKENS, seconds=0.4)
    prefill.offer(ticket, sign(ticket), decode.agent.address, (1,))
    prefill.release(ticket, token=1)
    assert (await prefill.result(ticket.handoff_id)).error
    await settled(prefill)


async def test_prefill_that_never_comes_costs_the_lease(decode: Decode) -> None:
    ticket = make_ticket(TOKENS, seconds=0.3)
    decode.reserve(ticket, sign(ticket), (1,))
    assert "lease" in (await decode.result(ticket.handoff_id)).error
    assert decode.pinned() == 0


async def test_a_decode_worker_that_dies_frees_prefill(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (1, 2))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    decode.agent.stop()
    prefill.release(ticket, token=1)
    assert (await prefill.result(ticket.handoff_id)).error
    await settled(prefill)


async def test_releasing_what_is_unknown_is_harmless(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(TOKENS)
    prefill.release(ticket, token=None)
    decode.release(ticket)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


def test_the_ledger_knows_what_it_should_not_hold() -> None:
    ledger = Ledger()
    entry = LedgerEntry("a", "sending", blocks=2, bytes=20, lease_expires=5.0)
    ledger.pin(entry, now=1.0)
    with pytest.raises(LedgerError, match="pinned twice"):
        ledger.pin(entry, now=1.0)
    ledger.grow("a", blocks=1, size=10, now=2.0)
    assert (ledger.entries()[0].blocks, ledger.entries()[0].bytes) == (3, 30)
    assert ledger.strays({"a"}, now=7.0, grace=3.0) == []
    assert [e.handoff_id for e in ledger.strays({"a"}, now=9.0, grace=3.0)] == ["a"]
    assert [e.handoff_id for e in ledger.strays(set(), now=1.0, grace=3.0)] == ["a"]
    with pytest.raises(LedgerError, match="differ: a"):
        ledger.check_integrity(set())
    assert ledger.unpin("a") and not ledger.unpin("a")
    ledger.check_integrity(set())
