"""The credit book and both pools as one model, walked through random interleavings, cancellations
and losses: prefill never pins more ahead of grants than it may, nothing is left behind, and without
the help of any lease something can always move until every request has ended."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.kv.credit import CreditBook

PREFILL_BLOCKS, DECODE_BLOCKS, LONGEST = 12, 9, 5
LIMIT = PREFILL_BLOCKS - LONGEST


@dataclass
class Request:
    """One handoff, on both sides.

    Attributes:
        prefill: queued, computing (holds blocks), computed (pinned until it has landed), gone.
        decode: queued, reserved, running, gone.
    """

    size: int
    prefill: str = "queued"
    decode: str = "queued"
    landed: bool = False


class World(RuleBasedStateMachine):
    """Prefill's queue is first come, first served, but for prompts that must wait for credit, as
    vLLM's is; decode's queue may come in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.book = CreditBook(LIMIT)
        self.requests: dict[str, Request] = {}
        self.prefill_queue: list[str] = []
        self.decode_queue: list[str] = []
        self.count = 0

    def held(self, side: str) -> int:
        states = {"prefill": ("computing", "computed"), "decode": ("reserved", "running")}[side]
        return sum(r.size for r in self.requests.values() if getattr(r, side) in states)

    # ---- what can move -----------------------------------------------------------------------

    def can_prefill(self) -> str | None:
        """The first prompt in the queue that has credit, if there are blocks for it."""
        for name in self.prefill_queue:
            request = self.requests[name]
            if self.book.admit(name, request.size):
                room = PREFILL_BLOCKS - self.held("prefill")
                return name if request.size <= room else None
        return None

    def can_reserve(self) -> str | None:
        for name in self.decode_queue[:1]:
            if self.requests[name].size <= DECODE_BLOCKS - self.held("decode"):
                return name
        return None

    def of(self, **states: object) -> list[str]:
        return [
            name
            for name, r in self.requests.items()
            if all(getattr(r, key) == value for key, value in states.items())
        ]

    def can_land(self) -> list[str]:
        return self.of(prefill="computed", decode="reserved")

    # ---- steps -------------------------------------------------------------------------------

    @rule(size=st.integers(1, LONGEST), at=st.integers(0, 20))
    def request(self, size: int, at: int) -> None:
        """The two sides may see requests in different orders."""
        name = f"r{self.count}"
        self.count += 1
        self.requests[name] = Request(size)
        self.prefill_queue.append(name)
        self.decode_queue.insert(at % (len(self.decode_queue) + 1), name)
        self.book.arrive(name)

    @rule()
    def prefill_begins(self) -> None:
        if name := self.can_prefill():
            self.prefill_queue.remove(name)
            self.requests[name].prefill = "computing"

    @rule(data=st.data())
    def prefill_computes(self, data: st.DataObject) -> None:
        if names := self.of(prefill="computing"):
            self.requests[data.draw(st.sampled_from(names))].prefill = "computed"

    @rule()
    def decode_reserves(self) -> None:
        if name := self.can_reserve():
            self.decode_queue.remove(name)
            self.requests[name].decode = "reserved"
            self.book.grant(name)

    @rule(data=st.data())
    def kv_lands(self, data: st.DataObject) -> None:
        if names := self.can_land():
            name = data.draw(st.sampled_from(names))
            self.requests[name].prefill = "gone"
            self.requests[name].decode = "running"
            self.book.end(name)

    @rule(data=st.data())
    def decode_ends(self, data: st.DataObject) -> None:
        if names := self.of(decode="running"):
            del self.requests[data.draw(st.sampled_from(names))]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def lost_or_cancelled(self, data: st.DataObject) -> None:
        """In any state, with whatever it holds on either side; a late grant changes nothing."""
        name = data.draw(st.sampled_from(sorted(self.requests)))
        del self.requests[name]
        for queue in (self.prefill_queue, self.decode_queue):
            if name in queue:
                queue.remove(name)
        self.book.end(name)
        self.book.grant(name)

    # ---- what holds always -------------------------------------------------------------------

    @invariant()
    def pins_stay_within_the_limit(self) -> None:
        ahead = sum(
            r.size
            for r in self.requests.values()
            if r.prefill in ("computing", "computed") and r.decode == "queued"
        )
        assert ahead <= self.book.ahead_bytes <= LIMIT

    @invariant()
    def something_can_move(self) -> None:
        """No deadlock: unless nothing is left, some step other than a lease's end is possible."""
        if not self.requests:
            assert self.book.empty
            return
        assert (
            self.can_prefill()
            or self.can_reserve()
            or self.can_land()
            or self.of(prefill="computing")
            or self.of(decode="running")
        ), self.requests


World.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
TestCreditWorld = World.TestCase


def test_a_prompt_larger_than_the_limit_waits_for_its_own_grant() -> None:
    book = CreditBook(10)
    book.arrive("a")
    assert not book.admit("a", 11) and book.waiting == 1
    book.grant("a")
    assert book.admit("a", 11) and book.ahead_bytes == 0
    book.end("a")
    assert book.empty
