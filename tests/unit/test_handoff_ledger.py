"""The ledger and what watches it: history, strays, reclaiming; and the doorkeeper's memory."""

from __future__ import annotations

import logging

import pytest

from cluster.errors import HandoffRefused
from cluster.kv.doorkeeper import Doorkeeper, Recent, Terms
from cluster.kv.geometry import KvGeometry
from cluster.kv.ledger import HISTORY, Ledger, LedgerEntry, LedgerError
from tests.handoff.agents import SIGNER, make_ticket, sign

TERMS = Terms("decode", "decode-life", "layout", KvGeometry(1, 2, 4), 0)


def entry(handoff_id: str = "h", blocks: int = 2, lease: float = 5.0) -> LedgerEntry:
    return LedgerEntry(handoff_id, "sending", blocks, blocks * 10, lease)


def test_an_entry_remembers_the_last_of_what_happened_to_it() -> None:
    ledger = Ledger()
    ledger.pin(entry(), now=1.0)
    ledger.grow("h", blocks=1, size=10, now=2.0)
    for i in range(HISTORY):
        ledger.note("h", f"event {i}", now=3.0)
    (kept,) = ledger.entries()
    assert len(kept.history) == HISTORY
    assert kept.history[0] == "3.000 event 0" and kept.history[-1] == f"3.000 event {HISTORY - 1}"
    ledger.note("unknown", "nothing", now=4.0)
    assert ledger.entries() == [kept]


def test_what_is_reclaimed_counts_as_leaked_and_what_is_unpinned_does_not() -> None:
    ledger = Ledger()
    ledger.pin(entry("a", blocks=2), now=1.0)
    ledger.pin(entry("b", blocks=3), now=1.0)
    assert ledger.unpin("a")
    taken = ledger.reclaim("b")
    assert taken is not None and taken.history == ("1.000 pinned 3 blocks",)
    assert ledger.reclaim("b") is None and not ledger.unpin("a")
    assert ledger.leaked_blocks == 3
    ledger.check_integrity(set())


def test_strays_are_those_that_nobody_owns_and_those_long_overdue() -> None:
    ledger = Ledger()
    ledger.pin(entry("owned", lease=5.0), now=1.0)
    ledger.pin(entry("orphan", lease=5.0), now=1.0)

    def strays(now: float) -> list[str]:
        return [stray.handoff_id for stray in ledger.strays({"owned"}, now, grace=3.0)]

    assert strays(now=1.0) == ["orphan"]
    assert strays(now=8.0) == ["orphan"]
    assert strays(now=8.1) == ["owned", "orphan"]


def test_integrity_is_entries_and_handoffs_one_to_one() -> None:
    ledger = Ledger()
    ledger.pin(entry("a"), now=1.0)
    with pytest.raises(LedgerError, match="pinned twice"):
        ledger.pin(entry("a"), now=1.0)
    ledger.check_integrity({"a"})
    with pytest.raises(LedgerError, match="differ: a, b"):
        ledger.check_integrity({"b"})


def test_recent_forgets_by_time_and_not_by_number() -> None:
    recent: Recent[int] = Recent()
    for key in range(1000):
        recent.add(key, now=0.0, until=10.0)
    assert all(key in recent for key in range(1000))
    recent.add(1000, now=10.0, until=20.0)
    assert 999 not in recent and 1000 in recent
    assert len(recent._until) == 1


def test_a_key_that_comes_again_is_kept_for_longer() -> None:
    recent: Recent[str] = Recent()
    recent.add("again", now=0.0, until=10.0)
    recent.add("once", now=0.0, until=10.0)
    recent.add("again", now=5.0, until=15.0)
    recent.add("late", now=12.0, until=30.0)
    assert "again" in recent and "once" not in recent


def test_a_ticket_is_good_once_for_each_rank_of_prefill() -> None:
    keeper = Doorkeeper(SIGNER, TERMS)
    wire = sign(make_ticket(8), prefill_geometry="2x2x4xplain")
    first, second = keeper.admit(wire, 0), keeper.admit(wire, 1)
    assert first.routes == second.routes and first.route != second.route
    for rank in (0, 1):
        with pytest.raises(HandoffRefused, match="has been used"):
            keeper.admit(wire, rank)


def test_a_refused_ticket_is_not_spent() -> None:
    keeper = Doorkeeper(SIGNER, TERMS)
    wire = sign(make_ticket(8))
    with pytest.raises(HandoffRefused, match="has nothing for rank 0"):
        keeper.admit(wire, 1)
    assert keeper.admit(wire, 0).plain is False


def test_a_closed_handoff_admits_nobody() -> None:
    keeper = Doorkeeper(SIGNER, TERMS)
    ticket = make_ticket(8)
    keeper.close(ticket.handoff_id)
    assert keeper.closed(ticket.handoff_id)
    with pytest.raises(HandoffRefused, match="has been used"):
        keeper.admit(sign(ticket), 0)


def test_other_blocks_cross_in_plain_order() -> None:
    keeper = Doorkeeper(SIGNER, TERMS)
    assert keeper.admit(sign(make_ticket(8), prefill_geometry="1x2x8xplain"), 0).plain


async def test_the_agent_takes_back_what_nobody_owns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.handoff.agents import Decode, random_cache, start_agent

    monkeypatch.setattr("cluster.kv.agent.SWEEP_SECONDS", 0.02)
    cache = random_cache(1)
    side = Decode(start_agent("decode", cache), cache)
    try:
        ticket = make_ticket(8)
        side.reserve(ticket, sign(ticket), (1, 2))
        ledger = side.agent._ledger
        with caplog.at_level(logging.ERROR, "cluster.kv"):
            side.agent.post(lambda: ledger.pin(entry("lost", blocks=4), now=0.0))
            await side.until(lambda: ledger.leaked_blocks == 4 and "reclaimed" in caplog.text)
        assert "reclaimed 4 blocks (sending) that handoff lost left: 0.000 pinned" in caplog.text
        pins = side.agent.pins()
        assert [e.handoff_id for e in pins.entries] == [ticket.handoff_id]  # it has an owner
        assert pins.leaked_blocks == 4
        side.release(ticket)
        await side.result(ticket.handoff_id)
        assert side.pinned() == 0
    finally:
        side.agent.stop()
