"""The connector's half in the scheduler: what it offers, reserves, allocates and lets go, step by
step, and who waits for credit."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from cluster.kv.connector import scheduler
from cluster.kv.connector.scheduler import SchedulerSide
from cluster.kv.connector.step import StepReport
from cluster.kv.credit import CreditBook
from cluster.kv.handoff import HandoffParams
from cluster.kv.sender import Offer, Release

BLOCK, BLOCK_BYTES = 4, 100


@dataclass
class Request:
    """As much of vLLM's as the connector looks at."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: dict[str, Any] | None
    num_computed_tokens: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.RUNNING

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)


def request(side: str, name: str, num_tokens: int) -> Request:
    params = HandoffParams(
        side=side,  # type: ignore[arg-type]
        handoff_id=f"h-{name}",
        ticket=f"ticket of {name}",
        num_tokens=num_tokens,
        expires_in=30.0,
        peers=("127.0.0.1:1",),
    )
    return Request(name, num_tokens, params.to_dict())


class Engine:
    """A scheduler's calls, in its order, around the half under test."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.side = SchedulerSide(BLOCK, BLOCK_BYTES, CreditBook(limit))
        self.blocks: dict[str, list[int]] = {}
        self.side.bind(SimpleNamespace(get_block_ids=lambda name: (self.blocks[name],)))  # type: ignore[arg-type]
        self._next = 1

    def add(self, request: Request) -> Request:
        self.side.on_new_request(request)  # type: ignore[arg-type]
        return request

    def matched(self, request: Request, local: int = 0) -> tuple[int | None, bool]:
        return self.side.matched_tokens(request, local)  # type: ignore[arg-type]

    def allocate(self, request: Request, external: int, shared: list[int] | None = None) -> None:
        """Blocks for the whole prompt."""
        shared = shared or []
        fresh = -(-request.num_prompt_tokens // BLOCK) - len(shared)
        self.blocks[request.request_id] = [*shared, *range(self._next, self._next + fresh)]
        self._next += fresh
        blocks = SimpleNamespace(get_block_ids=lambda: (self.blocks[request.request_id],))
        self.side.after_alloc(request, blocks, external)  # type: ignore[arg-type]

    def step(
        self,
        scheduled: dict[str, int] | None = None,
        new: list[Any] | None = None,
        cached: list[tuple[str, list[int] | None, int, bool]] | None = None,
        preempted: set[str] | None = None,
    ) -> Any:
        """`new`: (name, block ids, computed tokens); `cached`: (name, new block ids, computed,
        resumed)."""
        cached = cached or []
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled or {},
            preempted_req_ids=preempted,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, block_ids=(ids,), num_computed_tokens=computed)
                for name, ids, computed in new or []
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[name for name, *_ in cached],
                new_block_ids=[None if ids is None else (ids,) for _, ids, _, _ in cached],
                num_computed_tokens=[computed for _, _, computed, _ in cached],
                resumed_req_ids={name for name, _, _, resumed in cached if resumed},
            ),
        )
        return self.side.build(output)  # type: ignore[arg-type]

    def finish(self, request: Request, *tokens: int, status: RequestStatus | None = None) -> bool:
        request.output_token_ids = list(tokens)
        request.status = status or RequestStatus.FINISHED_LENGTH_CAPPED
        return self.side.request_finished(request)  # type: ignore[arg-type]


def test_a_prompt_is_offered_as_its_blocks_fill() -> None:
    engine = Engine()
    prompt = engine.add(request("prefill", "a", 10))
    assert engine.matched(prompt) == (0, False)
    engine.allocate(prompt, external=0)
    step = engine.step({"a": 6})
    assert [arrival.request for arrival in step.arrivals] == ["a"]
    assert step.offers == (Offer("h-a", 0, (1,), last=False),)
    prompt.num_computed_tokens = 6
    assert engine.step({"a": 1}).offers == ()  # no block is full
    prompt.num_computed_tokens = 7
    assert engine.step({"a": 3}).offers == (
        Offer("h-a", 1, (2, 3), last=True),
    )  # the last one, half full
    assert engine.finish(prompt, 42)
    assert engine.step().sent == (Release("h-a", 42),)


def test_a_prefix_that_prefill_has_cached_is_offered_too() -> None:
    engine = Engine()
    prompt = engine.add(request("prefill", "a", 12))
    engine.matched(prompt, local=8)
    engine.allocate(prompt, external=0, shared=[30, 31])
    prompt.num_computed_tokens = 8
    step = engine.step({"a": 4}, new=[("a", engine.blocks["a"], 8)])
    assert step.offers == (Offer("h-a", 0, (30, 31, 1), last=True),)
    assert step.allocated == (1,)  # the shared ones still are who they were


def test_what_a_step_hands_out() -> None:
    """New blocks of running requests, all of a resumed one's but those it shares, and of new ones
    what is beyond their computed prefix – whether handed off or not."""
    engine = Engine()
    step = engine.step(
        new=[("plain", [1, 2, 3], 0), ("half known", [4, 5, 6], 7)],
        cached=[
            ("grows", [7], 40, False),
            ("does not grow", None, 3, False),
            ("comes back", [8, 9, 10], 8, True),
        ],
    )
    assert step.allocated == (1, 2, 3, 5, 6, 7, 10)


def test_decode_reserves_what_it_does_not_hold() -> None:
    engine = Engine()
    prompt = engine.add(request("decode", "d", 10))
    assert engine.matched(prompt, local=0) == (10, True)  # no room: asked again later
    assert engine.matched(prompt, local=4) == (6, True)  # meanwhile another left its prefix
    engine.allocate(prompt, external=6, shared=[20])
    (reserve,) = engine.step().reserves
    assert (reserve.block_ids, reserve.held_tokens) == ((20, 1, 2), 4)
    assert (reserve.num_tokens, reserve.ticket) == (10, "ticket of d")
    assert engine.step().reserves == ()


def test_a_reservation_lasts_as_long_as_its_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now)
    engine = Engine()
    decode = engine.add(request("decode", "a", 10))
    now += 12.5  # no room meanwhile
    engine.matched(decode)
    engine.allocate(decode, external=10)
    (reserve,) = engine.step().reserves
    assert reserve.expires_in == 30.0 - 12.5


def test_a_preempted_decode_recomputes_and_reserves_nothing_again() -> None:
    engine = Engine()
    prompt = engine.add(request("decode", "d", 10))
    engine.matched(prompt)
    engine.allocate(prompt, external=10)
    engine.step()
    assert engine.matched(prompt, local=4) == (0, False)
    engine.allocate(prompt, external=0)
    step = engine.step(preempted={"d"})
    assert step.reserves == () and step.preempted == ()
    assert not engine.finish(prompt, 1, 2, 3)
    assert engine.step().received == ("h-d",)


def test_a_preempted_prefill_is_called_off_once() -> None:
    engine = Engine()
    prompt = engine.add(request("prefill", "a", 12))
    engine.matched(prompt)
    engine.allocate(prompt, external=0)
    engine.step({"a": 8})
    assert engine.step(preempted={"a"}).preempted == ("h-a",)
    resumed = engine.step({"a": 12}, cached=[("a", [9, 10, 11], 0, True)], preempted={"a"})
    assert resumed.preempted == () and resumed.offers == ()
    assert engine.finish(prompt, 42)
    assert engine.step().sent == (Release("h-a", None),)  # its token is not to be gone on with


def test_a_prefill_preempted_before_it_offered_anything_just_starts_again() -> None:
    engine = Engine()
    prompt = engine.add(request("prefill", "a", 8))
    engine.matched(prompt)
    engine.allocate(prompt, external=0)
    engine.step({"a": 2})
    assert engine.step(preempted={"a"}).preempted == ()
    assert engine.step({"a": 8}).offers == (Offer("h-a", 0, (1, 2), last=True),)


def test_only_a_first_token_is_gone_on_with() -> None:
    for tokens, status in [
        ((), RequestStatus.FINISHED_ABORTED),
        ((42,), RequestStatus.FINISHED_ABORTED),
        ((42,), RequestStatus.FINISHED_STOPPED),
        ((), RequestStatus.FINISHED_LENGTH_CAPPED),
    ]:
        engine = Engine()
        prompt = engine.add(request("prefill", "a", 4))
        engine.matched(prompt)
        engine.allocate(prompt, external=0)
        engine.step({"a": 4})
        assert engine.finish(prompt, *tokens, status=status)
        assert engine.step().sent == (Release("h-a", None),)


def test_a_request_that_ends_before_it_was_scheduled_pins_nothing() -> None:
    """It comes and goes between two steps: one step tells of both, the beginning with the end."""
    engine = Engine()
    prompt, waiting = (
        engine.add(request("prefill", "a", 4)),
        engine.add(request("decode", "d", 4)),
    )
    assert not engine.finish(prompt, status=RequestStatus.FINISHED_ABORTED)
    assert not engine.finish(waiting, status=RequestStatus.FINISHED_ABORTED)
    step = engine.step()
    assert [arrival.request for arrival in step.arrivals] == ["a"]
    assert step.sent == (Release("h-a", None),) and step.received == ("h-d",)
    assert engine.side.credit.empty


def test_requests_without_a_handoff_are_left_alone() -> None:
    engine = Engine()
    plain = engine.add(Request("p", 8, None))
    assert engine.matched(plain, local=4) == (0, False)
    engine.allocate(plain, external=0)
    step = engine.step({"p": 8})
    assert (step.offers, step.arrivals, step.reserves) == ((), (), ())
    assert not engine.finish(plain, 1)
    assert engine.step().sent == ()


# ---- credit ----------------------------------------------------------------------------------


def test_starved_of_credit_a_prompt_waits_and_pins_nothing() -> None:
    """Decode grants nothing: what was computed ahead fills the limit, and the rest waits."""
    engine = Engine(limit=3 * BLOCK_BYTES)
    first, second, third = (engine.add(request("prefill", name, 8)) for name in "abc")
    assert engine.matched(first) == (0, False)
    assert engine.matched(second) == engine.matched(third) == (None, False)
    assert (engine.side.credit.ahead_bytes, engine.side.credit.waiting) == (200, 2)
    engine.side.after_step(StepReport({"h-a"}), sent_requests=[])
    assert engine.matched(second) == (0, False)  # a's bytes are decode's business now
    assert engine.matched(third) == (None, False)


def test_a_grant_of_its_own_lets_a_prompt_pass_whatever_the_limit() -> None:
    engine = Engine(limit=0)
    prompt = engine.add(request("prefill", "a", 8))
    assert engine.matched(prompt) == (None, False)
    engine.side.after_step(StepReport({"h-a"}), sent_requests=[])
    assert engine.matched(prompt) == (0, False)
    assert engine.matched(prompt) == (0, False)


def test_without_room_behind_what_lands_only_a_granted_prompt_runs() -> None:
    engine = Engine()
    asked: list[int] = []

    def full(blocks: int) -> bool:
        asked.append(blocks)
        return False

    engine.side.may_run_ahead = full
    prompt = engine.add(request("prefill", "a", 2 * BLOCK + 1))
    assert engine.matched(prompt) == (None, False)
    assert (asked, engine.side.credit.ahead_bytes) == ([3], 0)
    engine.side.after_step(StepReport({"h-a"}), sent_requests=[])
    assert engine.matched(prompt) == (0, False)


def test_room_is_not_looked_for_without_credit() -> None:
    """Each prompt that waits asks at every step: what costs most comes last."""
    engine = Engine(limit=0)
    engine.side.may_run_ahead = lambda blocks: pytest.fail("asked")
    assert engine.matched(engine.add(request("prefill", "a", 8))) == (None, False)


def test_credit_comes_back_when_blocks_are_no_longer_pinned_and_not_before() -> None:
    engine = Engine(limit=2 * BLOCK_BYTES)
    first, second = (engine.add(request("prefill", name, 8)) for name in "ab")
    engine.matched(first)
    engine.allocate(first, external=0)
    engine.step({"a": 8})
    assert engine.finish(first, 42)
    assert engine.matched(second) == (None, False)  # the engine is done with a, decode is not
    engine.side.after_step(StepReport(), sent_requests=["a"])
    assert engine.matched(second) == (0, False)
    engine.finish(second, status=RequestStatus.FINISHED_ABORTED)
    assert engine.side.credit.empty


def test_the_router_is_told_when_credit_changes() -> None:
    engine = Engine(limit=0)
    assert engine.side.stats() is None
    prompt = engine.add(request("prefill", "a", 8))
    engine.matched(prompt)
    said = engine.side.stats()
    assert said is not None and said.data == {"results": [], "ahead_bytes": 0, "waiting": 1}
    assert not said.is_empty()
    assert engine.side.stats() is None


def test_a_first_token_is_known_once_any_rank_has_it_and_until_its_request_ends() -> None:
    engine = Engine()
    decode = engine.add(request("decode", "d", 11))
    report = StepReport({"h-x"}, {"d": 42}).aggregate(StepReport(set(), {"gone": 7}))
    engine.side.after_step(report, sent_requests=[])
    assert engine.side.first_token("d") == 42
    engine.finish(decode, status=RequestStatus.FINISHED_ABORTED)
    for name in ("d", "gone"):
        with pytest.raises(KeyError):
            engine.side.first_token(name)
