"""Least loaded, only what is ready and connected, and a reason when nothing is."""

from __future__ import annotations

import random
from dataclasses import replace

from router.placement import (
    Demand,
    LeastLoaded,
    Load,
    Placement,
    Plan,
    Target,
    Unplaced,
    WorkerView,
)

DEMAND = Demand("m", prompt_tokens=10, max_tokens=5, decodes=True)


def worker(name: str, role: str, load: Load | None = None, layout: str = "l") -> WorkerView:
    view = WorkerView(Target(name, "1"), "m", role, ready=True, connected=True, layout=layout)
    return replace(view, load=load or Load())


def place(*view: WorkerView, demand: Demand = DEMAND, seed: int = 0) -> Plan | Unplaced:
    placement: Placement = LeastLoaded(random.Random(seed))
    return placement.place(demand, view)


def ids(plan: Plan | Unplaced) -> tuple[str | None, ...]:
    assert isinstance(plan, Plan)
    targets = (plan.prefill, plan.decode, plan.whole)
    return tuple(target and target.worker_id for target in targets)


def test_least_loaded_pair() -> None:
    plan = place(
        worker("p0", "prefill", Load(queued_prompt_tokens=5)),
        worker("p1", "prefill", Load(queued_prompt_tokens=4)),
        worker("d0", "decode", Load(running_sequences=1, reserved_tokens=9)),
        worker("d1", "decode", Load(running_sequences=1, reserved_tokens=8)),
        worker("d2", "decode", Load(running_sequences=2)),
    )
    assert ids(plan) == ("p1", "d1", None)


def test_layouts_must_be_equal() -> None:
    idle_but_other = worker("p0", "prefill", layout="other")
    busy = worker("p1", "prefill", Load(queued_prompt_tokens=100))
    assert ids(place(idle_but_other, busy, worker("d0", "decode"))) == ("p1", "d0", None)
    unplaced = place(idle_but_other, worker("d0", "decode"))
    assert isinstance(unplaced, Unplaced)
    assert "same KV layout" in unplaced.missing


def test_only_ready_connected_and_of_the_model() -> None:
    good = worker("d0", "decode")
    for bad in (
        replace(worker("p0", "prefill"), ready=False),
        replace(worker("p0", "prefill"), connected=False),
        replace(worker("p0", "prefill"), model="other"),
    ):
        unplaced = place(bad, good)
        assert isinstance(unplaced, Unplaced)
        assert "prefill" in unplaced.missing
        assert "decode" not in unplaced.missing


def test_nothing_at_all() -> None:
    unplaced = place()
    assert unplaced == Unplaced("model m has no ready prefill worker and no ready decode worker")


def test_ties_are_broken_at_random() -> None:
    view = [worker(f"p{i}", "prefill") for i in range(4)] + [worker("d0", "decode")]
    assert {ids(place(*view, seed=seed))[0] for seed in range(50)} == {"p0", "p1", "p2", "p3"}


def test_workers_that_failed_are_the_last_choice() -> None:
    demand = replace(DEMAND, avoid=frozenset({"d0"}))
    busy = worker("d1", "decode", Load(running_sequences=50))
    prefill = worker("p0", "prefill")
    assert ids(place(prefill, worker("d0", "decode"), busy, demand=demand)) == ("p0", "d1", None)
    assert ids(place(prefill, worker("d0", "decode"), demand=demand)) == ("p0", "d0", None)


def test_one_token_takes_prefill_alone() -> None:
    demand = replace(DEMAND, decodes=False, max_tokens=1)
    assert ids(place(worker("p0", "prefill"), demand=demand)) == ("p0", None, None)


def test_both_roles() -> None:
    assert ids(place(worker("b0", "both"))) == (None, None, "b0")
    pair = place(worker("b0", "both"), worker("b1", "both", Load(running_sequences=3)))
    assert ids(pair) in [("b0", "b1", None), ("b1", "b0", None)]
    assert ids(place(worker("b0", "both"), worker("p0", "prefill", Load(9)))) == ("p0", "b0", None)
