"""I8: the planner never exceeds its budget, never goes below the minimum, does not oscillate under
constant load, and drains before it removes; whatever it sees."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.planner.actions import after, counted, plan_actions, serving
from cluster.planner.demand import Lengths
from cluster.planner.hardware import hardware
from cluster.planner.planner import Planner
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.state import (
    Add,
    ClassTargets,
    Flip,
    Observed,
    Policy,
    Remove,
    Role,
    Traffic,
    WorkerSeen,
)

WORKER = roofline(load_shape("llama-3.1-8b"), hardware("L40S"))
TARGETS = {"": ClassTargets(1.0, 0.05)}
LENGTHS = tuple(Lengths(200 + 37 * i, 20 + 9 * i) for i in range(40))
NAMES: dict[str, Role] = {"p": "prefill", "d": "decode", "b": "both"}

workers = st.lists(
    st.builds(
        WorkerSeen,
        worker_id=st.uuids().map(str),
        role=st.sampled_from(["prefill", "decode", "both"]),
        phase=st.sampled_from(["starting", "ready", "ready", "draining"]),
        since=st.floats(-300, 0),
    ),
    max_size=12,
).map(tuple)
rates = st.sampled_from([0.0, 0.3, 3.0, 20.0, 500.0, math.nan, math.inf, -1.0])


def fits(policy: Policy, seen: tuple[WorkerSeen, ...], decision: object) -> None:
    """Draining workers keep their GPUs; flips need none; what is added has room."""
    added = sum(isinstance(a, Add) for a in decision.actions)  # type: ignore[attr-defined]
    if added:
        assert len(seen) + added <= policy.max_workers


def _starting(*roles: str) -> tuple[WorkerSeen, ...]:
    return tuple(WorkerSeen(f"w{i}", role, "starting") for i, role in enumerate(roles))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@example(_starting("prefill", "prefill", "both", "both"), [0.0], 2, 2)
@given(workers, st.lists(rates, min_size=1, max_size=25), st.integers(1, 12), st.integers(1, 3))
def test_whatever_is_seen_the_bounds_hold(
    seen: tuple[WorkerSeen, ...], history: list[float], budget: int, minimum: int
) -> None:
    policy = Policy({"default": budget}, minimum=min(minimum, budget), max_step=3)
    planner = Planner(policy, WORKER, TARGETS)
    for i, rate in enumerate(history):
        now = policy.interval * i
        decision = planner.step(now, Observed(seen, {"": Traffic(rate, LENGTHS)}, now))
        fits(policy, seen, decision)
        for kind in (Add, Flip, Remove):
            acts = [a for a in decision.actions if isinstance(a, kind)]
            stuck = [a for a in acts if getattr(a, "reason", "").startswith("stuck")]
            assert len(acts) - len(stuck) <= policy.max_step
        known = {w.worker_id: w for w in seen}
        for action in decision.actions:
            if isinstance(action, Flip | Remove):  # never a worker twice, never one that ends
                assert known.pop(action.worker_id).phase != "draining"
        assert decision.target == after(seen, decision.actions)
        if decision.held:
            ends = [a for a in decision.actions if isinstance(a, Remove)]
            assert all(a.reason == "over the budget" for a in ends)
        before, target = counted(serving(seen)), decision.target
        for role in ("prefill", "decode", "both"):
            removed = sum(
                isinstance(a, Remove) and w.role == role and not a.reason.startswith("stuck")
                for a in decision.actions
                for w in seen
                if w.worker_id == getattr(a, "worker_id", "")
            )
            if removed and target.of(role):
                assert target.of(role) >= min(policy.minimum, before.of(role))
        seen = _obeyed(seen, decision.actions, now)


def _obeyed(seen: tuple[WorkerSeen, ...], actions: object, now: float) -> tuple[WorkerSeen, ...]:
    """A fleet that does at once what it is told."""
    there = {w.worker_id: w for w in seen if w.phase != "draining"}
    for i, action in enumerate(actions):  # type: ignore[var-annotated,arg-type]
        match action:
            case Flip(worker_id, role):
                there[worker_id] = WorkerSeen(worker_id, role, "ready", now)
            case Add(role, node_type):
                there[f"n{now}.{i}"] = WorkerSeen(f"n{now}.{i}", role, "ready", now, node_type)
            case Remove(worker_id):
                del there[worker_id]
    return tuple(there.values())


@pytest.mark.parametrize("rate", [0.5, 6.0, 11.0])
def test_constant_load_settles_and_stays(rate: float) -> None:
    """Poisson noise in every interval: after the first minutes the fleet hardly turns."""
    rng = random.Random(1)
    policy = Policy({"default": 12}, cold_start=30.0)
    planner = Planner(policy, WORKER, TARGETS)
    seen: tuple[WorkerSeen, ...] = tuple(
        WorkerSeen(f"w{i}", "prefill" if i % 2 else "decode", "ready") for i in range(4)
    )
    totals = []
    for i in range(150):
        now = policy.interval * i
        mean = rate * policy.interval
        arrived = max(0, round(rng.gauss(mean, math.sqrt(mean))))
        traffic = {"": Traffic(arrived / policy.interval, LENGTHS)}
        seen = _obeyed(seen, planner.step(now, Observed(seen, traffic, now)).actions, now)
        if i > 20:
            totals.append(len(seen))
    steps = [b - a for a, b in pairwise(totals) if a != b]
    turns = sum((a > 0) != (b > 0) for a, b in pairwise(steps))
    assert turns <= 2, totals


def test_a_decision_about_a_thousand_workers_takes_every_node_type() -> None:
    policy = Policy({"a": 600, "b": 400}, max_step=1000)
    planner = Planner(policy, WORKER, TARGETS)
    seen = tuple(WorkerSeen(f"w{i}", "prefill", "ready", node_type="a") for i in range(500))
    decision = planner.step(0.0, Observed(seen, {"": Traffic(9000.0, LENGTHS)}, 0.0))
    assert decision.target.total == 1000
    assert sum(isinstance(a, Flip) for a in decision.actions) <= 250  # half of them go on serving
    assert {a.node_type for a in decision.actions if isinstance(a, Add)} == {"a", "b"}


def test_flips_come_before_new_workers() -> None:
    from cluster.planner.actions import Wish
    from cluster.planner.state import Counts

    seen = tuple(WorkerSeen(f"d{i}", "decode", "ready") for i in range(4))
    want = Counts(prefill=3, decode=2)
    actions = plan_actions(Policy({"default": 9}), seen, Wish(want, want, want))
    assert [type(a) for a in actions] == [Flip, Flip, Add]


def test_workers_that_drain_already_make_room_in_a_smaller_budget() -> None:
    from cluster.planner.actions import Wish
    from cluster.planner.state import Counts

    want = Counts(prefill=2, decode=2)
    stay = [WorkerSeen(f"w{i}", "decode" if i % 2 else "prefill", "ready") for i in range(4)]
    leaves = WorkerSeen("gone", "decode", "draining")
    assert plan_actions(Policy({"default": 4}), [*stay, leaves], Wish(want, want, want)) == []
    smaller = plan_actions(Policy({"default": 3}), [*stay, leaves], Wish(want, want, want))
    assert [a.reason for a in smaller if isinstance(a, Remove)] == ["over the budget"]


def test_a_decision_says_why() -> None:
    planner = Planner(Policy({"default": 4}), WORKER, TARGETS)
    seen = (WorkerSeen("p", "prefill", "ready"), WorkerSeen("d", "decode", "ready"))
    decision = planner.step(0.0, Observed(seen, {"": Traffic(60.0, LENGTHS)}, 0.0))
    said = " ".join(decision.reasons)
    assert "60.00 requests/s" in said
    assert "out of reach" in said
    assert decision.shortfalls[0].kind == ""
    assert decision.inputs["rate_seen/all"] == 60.0


def test_unknown_classes_without_targets_are_held_and_named() -> None:
    planner = Planner(Policy({"default": 4}), WORKER, {"chat": ClassTargets(1, 1)})
    decision = planner.step(0.0, Observed((), {"code": Traffic(1.0, LENGTHS)}, 0.0))
    assert decision.held == "class 'code' has no targets"


@pytest.mark.parametrize(
    ("now", "observed", "said"),
    [
        (5.0, Observed((), {"": Traffic(math.nan)}, 5.0), "the arrival rate of '' is not a number"),
        (5.0, Observed((), {"": Traffic(-1.0)}, 5.0), "the arrival rate of '' is not a number"),
        (5.0, Observed((), {"": Traffic(1.0)}, 5.0, math.nan), "the backlog is not a number"),
        (5.0, Observed((), {}, 5.0), "there are no metrics"),
        (5.0, Observed((), {"": Traffic(1.0)}, -60.0), "the metrics are 65 s old"),
        (5.0, Observed((), {"": Traffic(1.0)}, 60.0), "the metrics are -55 s old"),
        (5.0, Observed((), {"": Traffic(1.0)}, math.nan), "the metrics are nan s old"),
        (9000.0, Observed((), {"": Traffic(1.0)}, 9000.0), "the clock jumped by +9000.0 s"),
        (-9000.0, Observed((), {"": Traffic(1.0)}, -9000.0), "the clock jumped by -9000.0 s"),
        (math.nan, Observed((), {"": Traffic(1.0)}, 5.0), "the clock jumped by +nan s"),
    ],
)
def test_what_decides_nothing_is_said_and_holds(now: float, observed: Observed, said: str) -> None:
    planner = Planner(Policy({"default": 4}), WORKER, TARGETS)
    seen = (WorkerSeen("p", "prefill", "ready"), WorkerSeen("d", "decode", "ready"))
    planner.step(0.0, Observed(seen, {"": Traffic(1.0, LENGTHS)}, 0.0))
    decision = planner.step(now, replace(observed, workers=seen))
    assert decision.held == said
    assert decision.actions == ()
    assert decision.target == counted(seen)


@pytest.mark.parametrize("burstiness", [math.nan, math.inf, -1.0, 0.0])
def test_a_burstiness_that_is_none_is_taken_for_none(burstiness: float) -> None:
    seen = (WorkerSeen("p", "prefill", "ready"), WorkerSeen("d", "decode", "ready"))
    wrong, plain = (Planner(Policy({"default": 4}), WORKER, TARGETS) for _ in range(2))
    for step in range(3):
        at = 5.0 * step
        odd = Observed(seen, {"": Traffic(4.0, LENGTHS, burstiness)}, at)
        even = Observed(seen, {"": Traffic(4.0, LENGTHS)}, at)
        assert wrong.step(at, odd) == plain.step(at, even)


def test_a_smaller_budget_ends_workers_where_it_is_smaller() -> None:
    """Not those of another node type, whose room is then given to new ones."""
    from cluster.planner.actions import Wish
    from cluster.planner.state import Counts

    seen = [
        WorkerSeen(f"{kind}{i}", "decode" if i % 2 else "prefill", "ready", i, kind)
        for i, kind in enumerate("aaaabb")
    ]
    want = Counts(prefill=3, decode=3)
    ends = plan_actions(Policy({"a": 2, "b": 4}), seen, Wish(want, want, want))
    assert [(a.worker_id[0], a.reason) for a in ends if isinstance(a, Remove)] == [
        ("a", "over the budget")
    ] * 2
    fewer = Counts(prefill=2, decode=2)  # what is not needed goes from there, too, and no more
    ends = plan_actions(Policy({"a": 2, "b": 4}), seen, Wish(fewer, fewer, fewer))
    assert [a.worker_id[0] for a in ends if isinstance(a, Remove)] == ["a", "a"]


@pytest.mark.parametrize(("roles", "left"), [("ppdd", "dp"), ("bbbb", "b"), ("ppddb", "bdp")])
def test_a_budget_without_room_for_one_worker_is_held_and_leaves_the_minimum(
    roles: str, left: str
) -> None:
    planner = Planner(Policy({"default": 1}, worker_gpus=2), WORKER, TARGETS)
    seen = tuple(WorkerSeen(f"w{i}", NAMES[r], "ready") for i, r in enumerate(roles))
    for i in range(3):
        decision = planner.step(5.0 * i, Observed(seen, {"": Traffic(3.0, LENGTHS)}, 5.0 * i))
        assert decision.held == "the budget has no room for one worker"
        seen = _obeyed(seen, decision.actions, 5.0 * i)
    assert "".join(sorted(w.role[0] for w in seen)) == left


def test_a_worker_that_loads_is_not_given_up() -> None:
    """A cold start that takes longer than configured: lifecycle.start_timeout_seconds is for it."""
    planner = Planner(Policy({"default": 2}, cold_start=60.0), WORKER, TARGETS)
    ready = WorkerSeen("p", "prefill", "ready", 130.0)
    loads = WorkerSeen("d", "decode", "starting", 0.0, loads=True)
    observed = Observed((ready, loads), {"": Traffic(3.0, LENGTHS)}, 135.0)
    assert planner.step(135.0, observed).actions == ()
    waits = replace(observed, workers=(ready, replace(loads, loads=False)), measured_at=140.0)
    assert Remove("d", "stuck while starting") in planner.step(140.0, waits).actions


@pytest.mark.parametrize(
    ("roles", "held"),
    [
        ("pddb", {"prefill": 1, "both": 1}),  # one was turned to both
        ("ppddb", {"both": 1}),
        ("ppdd", {"decode": 2, "both": 0}),  # and back
        ("ppdd", {"both": 0}),
        ("pdbbb", {"both": 3}),  # most of it, as it may be after a quiet night
        ("bbbb", {"prefill": 0}),  # there is none anyway
    ],
)
def test_what_a_person_holds_leaves_the_pools_beside_it(roles: str, held: dict[Role, int]) -> None:
    seen = tuple(WorkerSeen(f"w{i}", NAMES[r], "ready") for i, r in enumerate(roles))
    planner = Planner(Policy({"default": 6}), WORKER, TARGETS)
    for role, workers in held.items():
        planner.hold(role, workers)
    for i in range(20):
        decision = planner.step(5.0 * i, Observed(seen, {"": Traffic(6.0, LENGTHS)}, 5.0 * i))
        assert decision.actions == ()
