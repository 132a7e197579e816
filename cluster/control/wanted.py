"""Which workers are wanted, in which roles: what the configuration, people and the planner have set
together. Pure; the state is what the store keeps, so that a new controller goes on with it.

The numbers have one owner. While the planner acts it is the planner, from the configuration's
`replicas` on; else it is the configuration; a pool that a person has set is that person's until it
is released.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count

from cluster.config import Config, ModelConfig
from cluster.control.reconcile import Slot, desired_slots, worker_id
from cluster.planner.actions import Wish, counted, plan_actions, serving
from cluster.planner.state import (
    OVER_BUDGET,
    Action,
    Add,
    Counts,
    Flip,
    Policy,
    Remove,
    WorkerSeen,
)
from cluster.store.plan_records import ActionRecord, PlanState, WantedWorker

UNLIMITED = 1 << 20


def begun(config: Config) -> PlanState:
    """The configuration's own workers, and nothing set."""
    slots = [slot for slot in desired_slots(config) if slot.kind == "worker"]
    workers = tuple(WantedWorker(s.slot_id, s.model, s.role, s.role) for s in slots)
    return PlanState({m.name: replicas(m) for m in config.models}, workers)


def restored(config: Config, state: PlanState | None) -> PlanState:
    """The state for this configuration: a model whose replicas are others now begins with them;
    what people have set stays."""
    fresh = begun(config)
    if state is None:
        return fresh
    workers: list[WantedWorker] = []
    for model in config.models:
        kept = state.base.get(model.name) == fresh.base[model.name]
        workers += _of(state if kept else fresh, model.name)
    names = {model.name for model in config.models}
    out = {w.worker_id for w in state.workers if w.drained}
    return replace(
        state,
        base=fresh.base,
        workers=tuple(replace(w, drained=w.worker_id in out) for w in workers),
        manual={name: held for name, held in state.manual.items() if name in names},
    )


def reloaded(config: Config, state: PlanState) -> PlanState:
    """The state once the configuration has changed while the workers run: they are brought to new
    numbers step by step."""
    return replace(state, base={m.name: replicas(m) for m in config.models})


def replicas(model: ModelConfig) -> dict[str, int]:
    """The configuration's numbers, by role."""
    return {"prefill": model.prefill.replicas, "decode": model.decode.replicas}


def slots_of(config: Config, state: PlanState) -> tuple[Slot, ...]:
    """The slots to fill: wanted workers that are not drained, and the routers."""
    labels = {each.name: each.labels for each in config.planner.budget}
    slots = []
    for worker in state.workers:
        if worker.drained:
            continue
        model = config.model(worker.model)
        pool = model.decode if worker.pool == "decode" else model.prefill
        if extra := labels.get(worker.node_type):
            pool = pool.model_copy(update={"labels": {**pool.labels, **extra}})
        gpus = model.tensor_parallel_size
        slots.append(
            Slot(
                "worker", worker.worker_id, worker.model, worker.role, pool, gpus, worker.node_type
            )
        )
    routers = (slot for slot in desired_slots(config) if slot.kind == "router")
    return (*slots, *routers)


def settling(
    config: Config, state: PlanState, model: ModelConfig, workers: Sequence[WorkerSeen]
) -> list[Action]:
    """Steps towards what people have set – and, where the planner does not act, towards what the
    configuration says – within `policy_of`'s budget."""
    have = counted(serving(workers))
    owned = config.planner.mode != "act"
    base = dict(state.base[model.name]) if owned else {}
    for worker in _of(state, model.name):
        if worker.drained and base.get(worker.role):
            base[worker.role] -= 1  # it comes back; nothing is started in its place
    numbers = {**base, **state.manual.get(model.name, {})}
    want = replace(have, **numbers)
    if owned and not state.manual.get(model.name):
        want = replace(want, both=0)
    if want == have:
        return []
    actions = plan_actions(policy_of(config, state, model), workers, Wish(want, want, want))
    if owned:  # the budget is the planner's: it ends nothing where the planner does not act
        return [a for a in actions if not (isinstance(a, Remove) and a.reason == OVER_BUDGET)]
    return actions


def policy_of(
    config: Config, state: PlanState, model: ModelConfig, planning: bool = False
) -> Policy:
    """How the planner may act for a model: within what other models leave of the budget.

    Args:
        planning: without a budget the planner has what the replicas take, or what is there by a
            person's will; a person alone has no such limit.
    """
    settings = config.planner
    each = gpus_of(model)
    if settings.budget:
        budget = {kind.name: kind.gpus for kind in settings.budget}
        for worker in state.workers:
            if worker.model != model.name and not worker.drained:
                budget[charged(config, worker.node_type)] -= gpus_of(config.model(worker.model))
        budget = {name: max(0, gpus) for name, gpus in budget.items()}
    elif planning:
        there = sum(not w.drained for w in _of(state, model.name))
        budget = {"default": max(sum(replicas(model).values()), there) * each}
    else:
        budget = {"default": UNLIMITED}
    return Policy(
        budget,
        each,
        settings.min_per_pool,
        settings.max_step,
        settings.cold_start_seconds,
        settings.interval_seconds,
        settings.down_after_seconds,
        stale_after=max(30.0, 3 * settings.interval_seconds),
        disaggregate=config.placement.disaggregate,
    )


def charged(config: Config, node_type: str) -> str:
    """The part of the budget that a worker of this type takes: where it has no such part – the
    configuration's own workers name none, and a budget may be renamed – the first."""
    names = [kind.name for kind in config.planner.budget]
    return node_type if node_type in names else names[0] if names else "default"


def gpus_of(model: ModelConfig) -> int:
    """What one of its workers takes of the budget."""
    given = model.prefill.num_gpus
    return max(1, model.tensor_parallel_size if given is None else given)


def carried_out(
    state: PlanState, model: str, actions: Iterable[Action]
) -> tuple[PlanState, tuple[ActionRecord, ...]]:
    """The state after the actions, and the actions with the names of the workers they are about."""
    workers = list(state.workers)
    records: list[ActionRecord] = []
    done = dict(state.done.get(model, {}))
    for action in actions:
        match action:
            case Flip(name, role):
                workers = [replace(w, role=role) if w.worker_id == name else w for w in workers]
                records.append(ActionRecord("flip", name, role))
                done["flips"] = done.get("flips", 0) + 1
            case Add(role, node_type):
                name = _free_id(workers, model, role)
                pool = "decode" if role == "decode" else "prefill"
                workers.append(WantedWorker(name, model, role, pool, node_type))
                records.append(ActionRecord("add", name, role, node_type))
                done["added"] = done.get("added", 0) + 1
            case Remove(name, reason):
                workers = [w for w in workers if w.worker_id != name]
                records.append(ActionRecord("remove", name, reason=reason))
                done["removed"] = done.get("removed", 0) + 1
    state = replace(state, workers=tuple(workers), done={**state.done, model: done})
    return state, tuple(records)


def counts_of(state: PlanState, model: str) -> Counts:
    """Wanted workers by role; drained ones are not counted."""
    roles = [w.role for w in _of(state, model) if not w.drained]
    return Counts(roles.count("prefill"), roles.count("decode"), roles.count("both"))


def _of(state: PlanState, model: str) -> list[WantedWorker]:
    return [worker for worker in state.workers if worker.model == model]


def _free_id(workers: Iterable[WantedWorker], model: str, role: str) -> str:
    taken = {worker.worker_id for worker in workers}
    return next(name for i in count() if (name := worker_id(model, role, i)) not in taken)
