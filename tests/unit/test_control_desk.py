"""The planner's desk: recommendations change nothing, decisions do, people come first."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import Config
from cluster.control.desk import PlanDesk
from cluster.control.seen import seen_workers
from cluster.control.traffic import Look
from cluster.control.wanted import counts_of
from cluster.planner.demand import Lengths
from cluster.planner.state import Counts, Traffic
from cluster.store.plan_records import DecisionRecord, Order, PlanState, PlanView, Reply
from cluster.store.records import WorkerRecord
from tests.unit.test_control_wanted import lived


class Kept:
    """The store's side, in memory."""

    def __init__(self) -> None:
        self.logged: list[DecisionRecord] = []
        self.views: list[PlanView] = []
        self.orders: list[Order] = []
        self.replies: list[Reply] = []

    async def state(self) -> PlanState | None:
        return None

    async def keep_state(self, state: PlanState) -> None: ...

    async def log(self, decision: DecisionRecord) -> None:
        self.logged.append(decision)

    async def publish(self, view: PlanView) -> None:
        self.views.append(view)

    async def next_order(self) -> tuple[str, Order] | None:
        return ("mark", self.orders.pop(0)) if self.orders else None

    async def answer(self, mark: str, reply: Reply) -> None:
        self.replies.append(reply)


def config(mode: str, **planner: Any) -> Config:
    model = {
        "name": "m",
        "path": "/m",
        "engine": "simulated",
        "max_model_len": 4096,
        "simulation": {"step_seconds": 0.02, "prefill_token_seconds": 1e-4},
        "prefill": {"replicas": 2},
        "decode": {"replicas": 2},
    }
    return Config.model_validate(
        {
            "models": [model],
            "placement": {"disaggregate": "always"},
            "planner": {"mode": mode, "interval_seconds": 1, "cold_start_seconds": 2, **planner},
        }
    )


PROMPT_HEAVY = Traffic(9.0, (Lengths(2500, 4),) * 20)


async def planned(desk: PlanDesk, kept: Kept, times: int, traffic: Traffic | None) -> None:
    """So many decisions, whose actions take effect at once."""
    settings = desk.config
    records = [
        WorkerRecord(w.worker_id, "i", "m", w.role, "ready", block_size=32, num_blocks=4000)
        for w in desk.state.workers
    ]
    for i in range(times):
        now = 100.0 + i
        seen = seen_workers(now, settings, desk.state, lived(desk.state))
        look = None
        if traffic is not None:
            look = Look(now, {"m": {"interactive": traffic}}, {}, ())
        await desk.plan(now, kept, seen, look, [], records)  # type: ignore[arg-type]


async def ready(settings: Config) -> tuple[PlanDesk, Kept]:
    desk, kept = PlanDesk(settings), Kept()
    await desk.load(kept)  # type: ignore[arg-type]
    return desk, kept


@pytest.mark.parametrize("mode", ["recommend", "act"])
async def test_only_a_planner_that_acts_changes_anything(mode: str) -> None:
    desk, kept = await ready(config(mode))
    before = desk.state
    await planned(desk, kept, 12, PROMPT_HEAVY)
    flips = [d for d in kept.logged if d.actions]
    assert flips and flips[0].actions[0].kind == "flip" and flips[0].reasons
    assert {d.acted for d in kept.logged} == {mode == "act"}
    if mode == "act":
        assert counts_of(desk.state, "m") == Counts(3, 1)
        assert kept.views[-1].models[0].done == {"flips": 1}
    else:
        assert desk.state is before and kept.views[-1].models[0].done == {}
        assert kept.views[-1].models[0].decision.target == {"prefill": 3, "decode": 1}  # type: ignore[union-attr]


async def test_pools_that_a_person_holds_are_left_alone() -> None:
    desk, kept = await ready(config("act"))
    kept.orders.append(Order("scale", model="m", role="prefill", workers=2))
    kept.orders.append(Order("scale", model="m", role="decode", workers=2))
    await desk.take_orders(kept)  # type: ignore[arg-type]
    assert [reply.code for reply in kept.replies] == [0, 0]
    await planned(desk, kept, 12, PROMPT_HEAVY)
    assert counts_of(desk.state, "m") == Counts(2, 2)
    assert any("by hand until it is released" in r for d in kept.logged for r in d.reasons)


async def test_without_a_look_it_holds_and_says_so_once() -> None:
    desk, kept = await ready(config("act"))
    before = desk.state
    await planned(desk, kept, 10, None)
    assert desk.state is before and [d.held for d in kept.logged] == ["there are no metrics"]
    await planned(desk, kept, 3, PROMPT_HEAVY)
    assert not kept.logged[-1].held


async def test_a_model_that_nothing_is_known_of_is_held() -> None:
    unknown = Config.model_validate({"models": [{"name": "m", "path": "hub/unknown"}]})
    desk, kept = await ready(unknown)
    await planned(desk, kept, 2, PROMPT_HEAVY)
    assert "cannot tell how large it is" in kept.logged[-1].held
    assert kept.views[-1].models[0].decision is not None


async def test_a_budget_that_is_reloaded_counts_from_the_next_decision() -> None:
    desk, kept = await ready(config("act"))
    busy = Traffic(18.0, (Lengths(2500, 4),) * 20)
    await planned(desk, kept, 5, busy)
    assert counts_of(desk.state, "m").total == 4
    assert kept.logged[-1].shortfalls
    desk.reload(config("act", budget=[{"name": "here", "gpus": 8}]))
    await planned(desk, kept, 5, busy)
    added = [w for w in desk.state.workers if w.node_type == "here"]
    assert added and 4 < counts_of(desk.state, "m").total <= 8


async def test_a_decision_gives_way_to_an_order_that_came_before_it_and_after_the_look() -> None:
    """Models decide one after another, on one look: an order about the second comes while the
    first one's decision is written down."""
    desk, kept = await ready(two_models())
    first = kept.log

    async def log(decision: DecisionRecord) -> None:
        await first(decision)
        if not kept.replies:
            kept.orders.append(Order("flip", worker_id="n-prefill-0", role="decode"))
            await desk.take_orders(kept)  # type: ignore[arg-type]

    kept.log = log  # type: ignore[method-assign]
    before = counts_of(desk.state, "n")
    both = {name: {"interactive": PROMPT_HEAVY} for name in ("m", "n")}
    seen = seen_workers(100.0, desk.config, desk.state, lived(desk.state))
    records = [
        WorkerRecord(w.worker_id, "i", w.model, w.role, "ready", block_size=32, num_blocks=4000)
        for w in desk.state.workers
    ]
    await desk.plan(100.0, kept, seen, Look(100.0, both, {}, ()), [], records)  # type: ignore[arg-type]
    assert [reply.code for reply in kept.replies] == [0]
    (decided,) = [d for d in kept.logged if d.model == "n"]
    assert not decided.acted
    assert counts_of(desk.state, "n") == Counts(before.prefill - 1, before.decode + 1)


def two_models() -> Config:
    """The same twice, within a budget of what runs."""
    one = config("act").models[0]
    models = [one, one.model_copy(update={"name": "n"})]
    return config("act", budget=[{"name": "h", "gpus": 8}]).model_copy(update={"models": models})
