"""Which workers are wanted: who owns the numbers, what survives, what a budget has room for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.config import Config
from cluster.control.orders import obeyed
from cluster.control.reconcile import Life, Observed, Slot, SlotState, Turn, reconcile
from cluster.control.seen import seen_workers
from cluster.control.wanted import (
    begun,
    carried_out,
    counts_of,
    policy_of,
    reloaded,
    restored,
    settling,
    slots_of,
)
from cluster.errors import InvalidRequest
from cluster.planner.demand import Lengths
from cluster.planner.hardware import hardware
from cluster.planner.planner import Planner
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.state import Add, ClassTargets, Counts, Flip, Remove, Traffic
from cluster.planner.state import Observed as Metrics
from cluster.store.plan_records import Order, PlanState


def config(prefill: int = 2, decode: int = 2, **sections: Any) -> Config:
    model = {
        "name": "m",
        "path": "/m",
        "prefill": {"replicas": prefill, "num_cpus": 2},
        "decode": {"replicas": decode},
    }
    return Config.model_validate({"models": [model], **sections})


WORKER = roofline(load_shape("llama-3.1-8b"), hardware("L40S"))
ACT = {"planner": {"mode": "act"}}


def flip(worker_id: str, role: str) -> Order:
    return Order("flip", worker_id=worker_id, role=role)


def lived(state: PlanState) -> list[SlotState]:
    """Every wanted worker, ready."""
    return [
        SlotState(Slot("worker", w.worker_id, w.model, w.role), Life("i", "ready", 0.0, 0.0, 0.0))
        for w in state.workers
    ]


def settled(settings: Config, state: PlanState) -> PlanState:
    """The state once nothing is left to do."""
    for _ in range(20):
        seen = seen_workers(0.0, settings, state, lived(state))
        actions = settling(settings, state, settings.models[0], seen["m"])
        if not actions:
            return state
        state, _ = carried_out(state, "m", actions)
    raise AssertionError("it never settles")


def test_a_flipped_worker_keeps_what_its_pool_reserves() -> None:
    settings = config()
    state, said = obeyed(settings, begun(settings), flip("m-prefill-0", "decode"))
    assert "m is held at 1 prefill + 3 decode" in said
    slot = next(s for s in slots_of(settings, state) if s.slot_id == "m-prefill-0")
    assert (slot.role, slot.pool.num_cpus) == ("decode", 2)
    assert settled(settings, state) == state  # the hold is what keeps it


def test_released_pools_are_the_configurations_again_unless_the_planner_acts() -> None:
    for sections, after in (({}, Counts(2, 2)), (ACT, Counts(1, 3))):
        settings = config(**sections)
        state, _ = obeyed(settings, begun(settings), flip("m-prefill-0", "decode"))
        state, _ = obeyed(settings, state, Order("release", model="m"))
        assert counts_of(settled(settings, state), "m") == after


def test_other_replicas_are_reached_by_flips_before_anything_is_started() -> None:
    settings = config(3, 1)
    state = reloaded(settings, begun(config()))
    seen = seen_workers(0.0, settings, state, lived(state))
    (action,) = settling(settings, state, settings.models[0], seen["m"])
    assert isinstance(action, Flip) and action.role == "prefill"
    assert counts_of(settled(settings, state), "m") == Counts(3, 1)


def test_what_was_kept_goes_on_unless_the_replicas_are_others() -> None:
    settings = config()
    flipped, _ = obeyed(settings, begun(settings), flip("m-decode-1", "prefill"))
    kept = PlanState.from_json(flipped.to_json())
    assert restored(settings, kept) == flipped
    other = restored(config(2, 3), kept)
    assert counts_of(other, "m") == Counts(2, 3) and other.manual == flipped.manual
    assert restored(settings, None) == begun(settings)
    renamed = Config.model_validate({"models": [{"name": "n", "path": "/n"}]})
    assert restored(renamed, kept).manual == {}


def test_nothing_is_started_in_a_drained_workers_place() -> None:
    settings = config()
    state, _ = obeyed(settings, begun(settings), Order("drain", worker_id="m-decode-0"))
    assert settled(settings, state) == state
    assert "m-decode-0" not in {s.slot_id for s in slots_of(settings, state)}
    held, _ = obeyed(settings, state, Order("scale", model="m", role="decode", workers=2))
    held = settled(settings, held)
    assert counts_of(held, "m") == Counts(2, 2)  # a person asked for two that serve
    back, _ = obeyed(settings, held, Order("release", worker_id="m-decode-0"))
    assert back.manual == {"m": {"decode": 3}} and counts_of(back, "m") == Counts(2, 3)


def test_actions_get_names_that_are_free() -> None:
    state = begun(config())
    state, records = carried_out(
        state, "m", [Add("decode", "h100"), Remove("m-prefill-0"), Add("prefill", "h100")]
    )
    assert [r.worker_id for r in records] == ["m-decode-2", "m-prefill-0", "m-prefill-0"]
    assert state.done == {"m": {"added": 2, "removed": 1}}


def test_the_budget_is_shared_by_models_and_its_labels_are_added() -> None:
    both = [{"name": n, "path": "/x", "tensor_parallel_size": 2} for n in ("a", "b")]
    settings = Config.model_validate(
        {
            "models": both,
            "planner": {"budget": [{"name": "h100", "gpus": 9, "labels": {"gpu": "H100"}}]},
        }
    )
    state = begun(settings)
    assert policy_of(settings, state, settings.models[0]).budget == {"h100": 5}
    assert policy_of(settings, state, settings.models[0]).max_workers == 2
    state, _ = carried_out(state, "a", [Add("decode", "h100")])
    slot = next(s for s in slots_of(settings, state) if s.slot_id == "a-decode-1")
    assert slot.pool.labels == {"gpu": "H100"}
    with pytest.raises(InvalidRequest, match=r"over planner[.]budget, which has room for 2"):
        obeyed(settings, begun(settings), Order("scale", model="a", role="decode", workers=2))


def test_without_a_budget_the_planner_has_what_is_there_and_a_person_more() -> None:
    settings = config()
    state = begun(settings)
    assert policy_of(settings, state, settings.models[0], planning=True).max_workers == 4
    state, _ = obeyed(settings, state, Order("scale", model="m", role="decode", workers=5))
    state = settled(settings, state)
    assert policy_of(settings, state, settings.models[0], planning=True).max_workers == 7


@pytest.mark.parametrize(
    ("sections", "order", "says"),
    [
        ({"placement": {"disaggregate": "always"}},
         Order("scale", model="m", role="decode", workers=0), "placement.disaggregate is always"),
        ({"placement": {"disaggregate": "always"}, "one": True},
         Order("flip", worker_id="m-decode-0", role="prefill"), "without a decode worker"),
        ({"one": True, "none": True}, Order("drain", worker_id="m-prefill-0"), "no worker left"),
    ],
)  # fmt: skip
def test_what_would_leave_nobody_to_serve_is_refused(
    sections: dict[str, Any], order: Order, says: str
) -> None:
    decode = 0 if sections.pop("none", False) else 1
    settings = config(1, decode, **sections) if sections.pop("one", False) else config(**sections)
    with pytest.raises(InvalidRequest, match=says):
        obeyed(settings, begun(settings), order)


def test_reconcile_turns_a_life_once_and_again_when_that_is_due() -> None:
    slot = Slot("worker", "w", "m", "decode")
    life = Life("i", "ready", 0.0, 0.0, 0.0, role="prefill")

    def acts(now: float, **changes: Any) -> list[Any]:
        return reconcile(now, [slot], Observed((SlotState(slot, replace(life, **changes)),)))

    assert acts(1.0) == [Turn("w", "i", "decode")]
    assert acts(1.0, turns_at=None) == []  # it is being told
    assert acts(1.0, turns_at=6.0) == [] and acts(6.0, turns_at=6.0) != []
    assert acts(1.0, role="decode") == [] and acts(1.0, role="") == []
    assert acts(1.0, phase="stopping") == []


def stopping(states: list[SlotState], worker_id: str) -> list[SlotState]:
    """The same, with this one's life on its way out."""
    life = Life("i", "stopping", 0.0, 0.0, 0.0)
    return [replace(s, life=life) if s.slot.slot_id == worker_id else s for s in states]


def test_a_worker_released_while_it_still_drains_gets_no_second_in_its_place() -> None:
    settings = config()
    slots = stopping(lived(begun(settings)), "m-decode-0")
    state, _ = obeyed(settings, begun(settings), Order("drain", worker_id="m-decode-0"))
    (gone,) = (w for w in seen_workers(9.0, settings, state, slots)["m"] if w.phase == "draining")
    assert gone.worker_id == "m-decode-0"
    state, _ = obeyed(settings, state, Order("release", worker_id="m-decode-0"))
    seen = seen_workers(9.0, settings, state, slots)["m"]
    assert settling(settings, state, settings.models[0], seen) == []


def test_only_a_worker_without_a_host_waits() -> None:
    settings = config(1, 1)
    slots = [
        replace(slot, life=Life("i", "starting", 0.0, placed_at=host))
        for slot, host in zip(lived(begun(settings)), (None, 1.0), strict=True)
    ]
    assert [w.waits for w in seen_workers(9.0, settings, begun(settings), slots)["m"]] == [
        True,
        False,
    ]


def test_a_scale_ends_no_more_than_was_asked_for_where_the_planner_does_not_act() -> None:
    """Even if more runs than the budget would give the planner."""
    settings = config(4, 4, planner={"budget": [{"name": "h100", "gpus": 4}]})
    state, _ = obeyed(
        settings, begun(settings), Order("scale", model="m", role="decode", workers=3)
    )
    assert counts_of(settled(settings, state), "m") == Counts(4, 3)


def test_every_worker_is_charged_to_a_part_of_the_budget() -> None:
    """One that drains to its own; those of a part that was renamed to the first."""
    parts = [{"name": name, "gpus": 4} for name in ("a", "b")]
    settings = config(planner={"mode": "act", "budget": parts})
    state, _ = carried_out(begun(settings), "m", [Add("decode", "b")])
    assert [s.node_type for s in slots_of(settings, state)][:5] == ["", "", "", "", "b"]
    slots = [
        SlotState(slot, Life("i", "ready", 0.0, 0.0, 0.0))
        for slot in slots_of(settings, state)
        if slot.kind == "worker"
    ]
    left, _ = carried_out(state, "m", [Remove("m-decode-2")])
    last = seen_workers(0.0, settings, left, slots)["m"][-1]
    assert (last.worker_id, last.phase, last.node_type) == ("m-decode-2", "draining", "b")
    renamed = config(planner={"mode": "act", "budget": [{"name": "c", "gpus": 8}]})
    assert {w.node_type for w in seen_workers(0.0, renamed, state, slots)["m"]} == {"c"}


def test_models_that_share_a_halved_budget_both_keep_a_worker_of_each_role() -> None:
    two = [{"name": n, "path": "/x"} for n in ("a", "b")]
    pools = {"prefill": {"replicas": 2}, "decode": {"replicas": 2}}
    settings = Config.model_validate(
        {"models": [m | pools for m in two],
         "planner": {"mode": "act", "budget": [{"name": "h", "gpus": 4}]}}
    )  # fmt: skip
    state = begun(settings)
    for now in range(4):
        for model in settings.models:
            policy = policy_of(settings, state, model, planning=True)
            planner = Planner(policy, WORKER, {"": ClassTargets(1.0, 0.05)})
            seen = tuple(seen_workers(now, settings, state, lived(state))[model.name])
            observed = Metrics(seen, {"": Traffic(1.0, (Lengths(500, 50),))}, now)
            state, _ = carried_out(state, model.name, planner.step(now, observed).actions)
    assert [counts_of(state, name) for name in ("a", "b")] == [Counts(1, 1)] * 2
