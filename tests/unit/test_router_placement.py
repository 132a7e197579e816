"""Joint placement: what it weighs, and what it must never do."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.costs import ColumnCosts
from router.fleet import Fleet
from router.joint import JointPlacement
from router.learn import Observed, learn, shares_of
from router.output import Stage
from router.placement import Candidate, Decision, Demand, Mode, Target, Unplaced, WorkerView
from router.row_costs import RowCosts
from router.share import Share

DEMAND = Demand("m", 1000, 100, decodes=True)


def worker(worker_id: str, role: str, **changes: object) -> WorkerView:
    view = WorkerView(Target(worker_id, "x"), "m", role, True, True, "l", 32, 100_000)
    return replace(view, **changes)  # type: ignore[arg-type]


def fleet(*views: WorkerView) -> Fleet:
    made = Fleet()
    for view in views:
        made.join(view)
    return made


def put(made: Fleet, slot: int, stage: Stage, seconds: float = 0.05, times: int = 1) -> None:
    for _ in range(times):
        share = Share(slot, stage, 1000, 100.0, seconds)
        made.take(0.0, share)
        if stage is Stage.DECODE:
            made.answered(0.0, share)


def decide(
    made: Fleet, demand: Demand = DEMAND, mode: Mode = "auto", seed: int = 0, now: float = 0.0
) -> Decision:
    decision = JointPlacement(made, mode, random.Random(seed)).place(now, demand)
    assert isinstance(decision, Decision), decision
    return decision


def ids(decision: Decision | Candidate) -> tuple[str | None, ...]:
    plan = decision.plan
    return tuple(t and t.worker_id for t in (plan.prefill, plan.decode, plan.whole))


def refused(made: Fleet, demand: Demand = DEMAND, mode: Mode = "always") -> str:
    decision = JointPlacement(made, mode, random.Random(0)).place(0.0, demand)
    assert isinstance(decision, Unplaced)
    return decision.missing


PAIRS = ("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")


def two_of_each() -> Fleet:
    return fleet(*(worker(name, role) for name, role in PAIRS))


def test_the_least_loaded_pair() -> None:
    made = two_of_each()
    put(made, 0, Stage.PREFILL, 0.5)
    put(made, 2, Stage.DECODE, times=40)
    assert ids(decide(made, mode="always")) == ("p1", "d1", None)


def test_a_prefix_outweighs_a_queue_that_is_shorter_than_it_saves() -> None:
    made = two_of_each()
    put(made, 0, Stage.PREFILL, 0.05)
    long = replace(DEMAND, prompt_tokens=20_000, held={0: 19_000})
    assert ids(decide(made, long, "always"))[0] == "p0"
    put(made, 0, Stage.PREFILL, 2.0)
    assert ids(decide(made, long, "always"))[0] == "p1"


def test_the_speed_that_was_seen_counts() -> None:
    made = two_of_each()
    for _ in range(5):
        made.saw_prefill(0, 1000, 0.4)
        made.saw_step(2, 1.0, 0.08)
    assert ids(decide(made, mode="always")) == ("p1", "d1", None)
    assert decide(made, mode="always").chosen.ttft_seconds == pytest.approx(0.029, abs=0.005)


def test_a_worker_that_was_slow_once_is_tried_again() -> None:
    made = two_of_each()
    made.tick(0.0)
    made.saw_prefill(0, 1000, 0.4)
    chosen = set()
    for second in range(1, 90):
        made.tick(float(second))
        made.saw_prefill(1, 1000, 0.03)
        chosen.add(ids(decide(made, mode="always", now=float(second)))[0])
        assert second > 10 or chosen == {"p1"}
    assert chosen == {"p0", "p1"}


def test_a_full_kv_pool_is_waited_for() -> None:
    made = fleet(
        worker("p0", "prefill"),
        worker("d0", "decode", kv_tokens=2000),
        worker("d1", "decode"),
    )
    put(made, 1, Stage.DECODE)
    put(made, 2, Stage.DECODE, times=8)
    assert ids(decide(made, mode="always")) == ("p0", "d1", None)


def test_whole_on_an_idle_worker_for_a_short_prompt() -> None:
    made = two_of_each()
    for slot in (2, 3):
        made.saw_exposed(slot, 100, 0.05)
    decision = decide(made, replace(DEMAND, prompt_tokens=100))
    assert ids(decision)[2] is not None
    assert any(loser.plan.decode for loser in decision.losers)


def test_split_where_a_long_prompt_would_stall_many() -> None:
    made = fleet(worker("p0", "prefill"), worker("d0", "decode"), worker("d1", "decode"))
    for _ in range(60):  # p0 computes prompts most of the time, so decodes would crawl there
        share = Share(0, Stage.PREFILL, 1000, 100.0, 0.12)
        made.take(0.0, share)
        made.release(0.0, share)
    put(made, 1, Stage.DECODE, times=60)
    put(made, 2, Stage.DECODE, times=60)
    demand = replace(DEMAND, prompt_tokens=16_000, tpot_seconds=0.02)
    assert ids(decide(made, demand))[0] == "p0"
    made = fleet(worker("p0", "prefill"), worker("d0", "decode"))
    assert ids(decide(made, demand))[2] is not None  # nobody is there to be stalled


def test_the_share_of_prompts_is_known_though_a_worker_was_seen_for_seconds_only() -> None:
    made = two_of_each()
    for now in range(4):
        made.load(float(now))
        for slot, seconds in ((0, 0.6), (1, 0.2)):
            made.take(float(now), Share(slot, Stage.PREFILL, 1000, 100.0, seconds))
    busy = made.load(4.0)[0]
    assert busy[:2] == pytest.approx([0.46, 0.15], abs=0.02)  # one second counts as idle
    assert [made.busy_of(4.0, slot) for slot in (0, 1)] == pytest.approx(busy[:2])


def test_prompts_that_come_in_large_lumps_are_the_greater_risk_to_a_decode() -> None:
    made = two_of_each()
    lumps = ((0, 2.0, 1), (1, 0.02, 100))  # as much of either's time
    for slot, seconds, times in lumps:
        for _ in range(times):
            share = Share(slot, Stage.PREFILL, 1000, 100.0, seconds)
            made.take(0.0, share)
            made.release(0.0, share)
    demand = replace(DEMAND, tpot_seconds=0.025)
    by_id = {name: made.slot_of(Target(name, "x")) for name, _ in PAIRS}
    made.load(-9.0)
    costs = RowCosts(made).of(0.0, demand, by_id)
    assert costs.whole_tpot[0] == pytest.approx(costs.whole_tpot[1])
    assert costs.whole[0] > costs.whole[1] + 0.2


def test_what_decodes_take_is_not_learned_beside_prompts_that_leave_them_no_time() -> None:
    made = two_of_each()
    decision = decide(made, mode="never")
    slot = decision.chosen.slots[0]
    shares = shares_of(decision.chosen, 1000, 50.0)
    made.take(0.0, shares[Stage.WHOLE])
    seen = Observed(1000, 1000, 0.1, tokens=52, decode=50 * 0.08)
    learn(made, 0.0, "m", decision.chosen, shares, seen)
    known = made.speeds.step.one(1.5, slot)
    assert known == pytest.approx(0.08, rel=0.1)
    put(made, slot, Stage.PREFILL, 10.0)
    assert made.busy_of(0.0, slot) > 0.9
    learn(made, 0.0, "m", decision.chosen, shares, seen)
    assert made.speeds.step.one(1.5, slot) == known


def test_who_has_not_decoded_yet_is_expected_to_be_as_those_of_its_model_who_have() -> None:
    made = two_of_each()
    other = made.join(worker("q0", "prefill", model="other"))
    before = made.pace.copy()
    for slot in (2, 3):
        for _ in range(30):
            made.saw_step(slot, 1.0, 0.04 * slot)
    made.saw_step(0, 1.0, 0.3)
    made.tick(10.0)
    assert made.pace[0] == pytest.approx(0.3)  # it was seen
    assert made.pace[1] == pytest.approx((0.3 * 0.08 * 0.12) ** (1 / 3), rel=0.01)
    assert made.pace[other] == before[other]


def test_a_strict_one_has_a_small_batch_and_keeps_it() -> None:
    made = two_of_each()
    for batch in (1, 2, 4, 8, 16, 32, 64):
        for slot in range(4):
            made.saw_step(slot, batch, 2e-3 * batch)
    put(made, 2, Stage.DECODE, times=6)
    strict = replace(DEMAND, tpot_seconds=0.01)
    decision = decide(made, strict, "always")
    assert ids(decision)[1] == "d1"
    (share,) = (s for s in shares_of(decision.chosen, 1000, 100.0, 0.01).values() if s.slot == 3)
    made.take(0.0, share)
    put(made, 3, Stage.DECODE, times=2)
    assert made.decodes[3] < made.decodes[2]
    assert ids(decide(made, mode="always"))[1] == "d0"  # one more there, and it would be late
    made.release(0.0, share)
    assert ids(decide(made, mode="always"))[1] == "d1"


def test_whole_on_decode_when_the_prefill_pool_is_saturated() -> None:
    made = fleet(worker("p0", "prefill"), worker("d0", "decode"))
    put(made, 0, Stage.PREFILL, 5.0)
    assert ids(decide(made)) == (None, None, "d0")


def test_whole_when_the_prefix_is_warm_on_decode() -> None:
    made = fleet(worker("p0", "prefill"), worker("d0", "decode"))
    put(made, 1, Stage.DECODE, times=4)
    demand = replace(DEMAND, prompt_tokens=16_000, held={1: 15_900})
    assert ids(decide(made, demand)) == (None, None, "d0")


def test_one_pool_empty() -> None:
    for role in ("prefill", "decode"):
        assert ids(decide(fleet(worker("w", role)))) == (None, None, "w")
        assert "has no ready" in refused(fleet(worker("w", role)))


def test_modes() -> None:
    made = two_of_each()
    assert ids(decide(made, mode="always"))[2] is None
    put(made, 2, Stage.DECODE, times=100)
    put(made, 3, Stage.DECODE, times=100)
    assert ids(decide(made, replace(DEMAND, prompt_tokens=16_000), "never"))[2] is not None


def test_layouts_must_be_equal() -> None:
    made = fleet(
        worker("p0", "prefill", layout="other"), worker("p1", "prefill"), worker("d0", "decode")
    )
    put(made, 1, Stage.PREFILL, 3.0)
    assert ids(decide(made, mode="always")) == ("p1", "d0", None)
    alone = fleet(worker("p0", "prefill", layout="other"), worker("d0", "decode"))
    assert "same KV layout" in refused(alone)


def test_only_ready_connected_and_of_the_model() -> None:
    for bad in ({"ready": False}, {"connected": False}, {"model": "other"}):
        missing = refused(fleet(worker("p0", "prefill", **bad), worker("d0", "decode")))
        assert "prefill" in missing and "decode" not in missing
    assert refused(Fleet()) == "model m has no ready prefill worker and no ready decode worker"
    assert refused(Fleet(), mode="auto") == "model m has no ready worker"


def test_changes_are_seen_at_once() -> None:
    made = two_of_each()
    placement = JointPlacement(made, "always", random.Random(0))
    made.update(0, worker("p0", "prefill", ready=False))
    for _ in range(20):
        decision = placement.place(0.0, DEMAND)
        assert isinstance(decision, Decision) and ids(decision)[0] == "p1"
    made.leave(1)
    assert isinstance(placement.place(0.0, DEMAND), Unplaced)


def test_ties_are_broken_at_random() -> None:
    made = fleet(*(worker(f"p{i}", "prefill") for i in range(4)), worker("d0", "decode"))
    chosen = {ids(decide(made, mode="always", seed=seed))[0] for seed in range(60)}
    assert chosen == {"p0", "p1", "p2", "p3"}


def test_workers_that_failed_are_the_last_choice() -> None:
    made = fleet(worker("p0", "prefill"), worker("d0", "decode"), worker("d1", "decode"))
    put(made, 2, Stage.DECODE, times=50)
    demand = replace(DEMAND, avoid=frozenset({"d0"}))
    assert ids(decide(made, demand, "always")) == ("p0", "d1", None)
    made.leave(2)
    assert ids(decide(made, demand, "always")) == ("p0", "d0", None)


def test_one_token_takes_prefill_alone() -> None:
    demand = replace(DEMAND, decodes=False, max_tokens=1)
    assert ids(decide(two_of_each(), demand, "always"))[1:] == (None, None)


def test_both_roles() -> None:
    assert ids(decide(fleet(worker("b0", "both")), mode="always")) == (None, None, "b0")
    pair = ids(decide(fleet(worker("b0", "both"), worker("b1", "both")), mode="always"))
    assert pair in [("b0", "b1", None), ("b1", "b0", None)]


Event = tuple[int, str, float]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["prefill", "decode", "whole"]),
            st.floats(0.001, 5.0),
            st.booleans(),
        ),
        max_size=40,
    ),
    st.integers(1, 100_000),
    st.sampled_from(["auto", "always", "never"]),
)
def test_whatever_was_put_on_it_a_fleet_returns_to_zero_and_predictions_stay_finite(
    events: list[tuple[int, str, float, bool]], prompt: int, mode: Mode
) -> None:
    views = [worker(f"w{i}", ["prefill", "decode", "both"][i % 3]) for i in range(6)]
    made = fleet(*views)
    shares = []
    for now, (slot, stage, seconds, answered) in enumerate(events):
        share = Share(slot, Stage(stage), prompt, 100.0, seconds)
        made.take(float(now), share)
        if answered:
            made.answered(now + seconds, share)
        made.saw_prefill(slot, prompt, seconds)
        made.saw_step(slot, 3.0, seconds)
        shares.append(share)
    demand = replace(DEMAND, prompt_tokens=prompt, held={0: prompt, 5: prompt // 2})
    chosen = decide(made, demand, mode, now=float(len(events))).chosen
    assert 0 < chosen.ttft_seconds < 1e6 and 0 <= chosen.tpot_seconds < 1e6
    assert 0 < chosen.uncached_tokens <= prompt
    for share in shares:
        made.release(100.0, share)
    for column in (made.backlog, made.queue, made.decodes, made.kv_used, made.context):
        assert abs(column).max() < 1e-6


loads = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(list(Stage)), st.floats(0.001, 1.0)), max_size=12
)


@settings(max_examples=100, deadline=None)
@given(
    loads,
    st.dictionaries(st.integers(0, 3), st.integers(0, 2000), max_size=3),
    st.integers(1, 4000),
    st.floats(0.01, 4.0),
    st.frozensets(st.sampled_from(["p0", "d1"])),
)
def test_row_by_row_it_costs_what_it_costs_by_columns(
    put_there: list[tuple[int, Stage, float]],
    held: dict[int, int],
    prompt: int,
    waited: float,
    avoid: frozenset[str],
) -> None:
    made = fleet(*(worker(*pair, kv_tokens=5000) for pair in PAIRS))
    for slot, stage, seconds in put_there:
        put(made, slot, stage, seconds)
        made.saw_prefill(slot, 100 * (slot + 1), seconds)
    by_id = {name: made.slot_of(Target(name, "x")) for name, _ in PAIRS}
    demand = replace(DEMAND, prompt_tokens=prompt, held=held, waited_seconds=waited, avoid=avoid)
    rows = vars(RowCosts(made).of(1.0, demand, by_id))
    for name, column in vars(ColumnCosts(made).of(1.0, demand, by_id)).items():
        assert rows[name] == pytest.approx(list(column), rel=1e-9), name
