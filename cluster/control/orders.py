"""What operators may ask for, checked and carried out on the state. Pure."""

from __future__ import annotations

from dataclasses import replace

from cluster.config import Config, ModelConfig
from cluster.control.wanted import counts_of, policy_of
from cluster.errors import InvalidRequest, NotFound
from cluster.planner.state import ROLES, Counts, Role
from cluster.store.plan_records import Order, PlanState, WantedWorker

CLASSES = ("interactive", "standard", "batch")
MAX_WORKERS = 4096


def obeyed(config: Config, state: PlanState, order: Order) -> tuple[PlanState, str]:
    """The state with the order carried out, and what was done, in words.

    Raises:
        NotFound: there is no such model or worker.
        InvalidRequest: it cannot be had; says what to do instead.
    """
    match order.kind:
        case "scale":
            return _scale(config, state, order)
        case "flip":
            return _flip(config, state, order)
        case "drain":
            return _drain(config, state, order)
        case "targets":
            return _targets(state, order)
        case "release":
            return _release(state, order)
    raise InvalidRequest("order", f"{order.kind!r} is not known to this controller: update it")


def _scale(config: Config, state: PlanState, order: Order) -> tuple[PlanState, str]:
    model, role = _model(config, order.model), _role(order.role)
    if not 0 <= order.workers <= MAX_WORKERS:
        raise InvalidRequest("workers", f"must be 0 to {MAX_WORKERS}, not {order.workers}")
    have = counts_of(state, model.name)
    want = replace(have, **{role: order.workers})
    _check(config, state, model, want, role)
    return _held(state, model.name, {role: order.workers}), (
        f"{model.name}: {role} is held at {order.workers} (was {have.of(role)}) until "
        f"`pdserve release {model.name}`"
    )


def _flip(config: Config, state: PlanState, order: Order) -> tuple[PlanState, str]:
    worker, role = _worker(state, order.worker_id), _role(order.role)
    if worker.drained:
        raise InvalidRequest(
            "worker_id",
            f"{worker.worker_id} is drained: `pdserve release {worker.worker_id}` first",
        )
    if worker.role == role:
        raise InvalidRequest("role", f"{worker.worker_id} is {role} already")
    model, former = _model(config, worker.model), worker.role
    have = counts_of(state, model.name)
    want = replace(have, **{former: have.of(_role(former)) - 1, role: have.of(role) + 1})
    _check(config, state, model, want, _role(former))
    turned = tuple(
        replace(w, role=role) if w.worker_id == worker.worker_id else w for w in state.workers
    )
    done = dict(state.done.get(model.name, {}))
    done["flips"] = done.get("flips", 0) + 1
    state = replace(state, workers=turned, done={**state.done, model.name: done})
    held = {former: want.of(_role(former)), role: want.of(role)}
    return _held(state, model.name, held), (
        f"{worker.worker_id} becomes {role}; {model.name} is held at {want} until "
        f"`pdserve release {model.name}`"
    )


def _drain(config: Config, state: PlanState, order: Order) -> tuple[PlanState, str]:
    worker = _worker(state, order.worker_id)
    if worker.drained:
        raise InvalidRequest("worker_id", f"{worker.worker_id} is drained already")
    model, role = _model(config, worker.model), _role(worker.role)
    have = counts_of(state, model.name)
    _check(config, state, model, replace(have, **{role: have.of(role) - 1}), role)
    drained = tuple(
        replace(w, drained=True) if w.worker_id == worker.worker_id else w for w in state.workers
    )
    state = _counted(replace(state, workers=drained), worker, -1)
    return state, (
        f"{worker.worker_id} takes nothing new, ends what it has within "
        f"{config.lifecycle.drain_timeout_seconds:g} s and stays out until "
        f"`pdserve release {worker.worker_id}`"
    )


def _targets(state: PlanState, order: Order) -> tuple[PlanState, str]:
    if order.slo_class not in CLASSES:
        raise InvalidRequest(
            "slo_class", f"{order.slo_class!r} is none; they are {', '.join(CLASSES)}"
        )
    given = {"ttft_seconds": order.ttft_seconds, "tpot_seconds": order.tpot_seconds}
    for name, seconds in given.items():
        if not 0 <= seconds < float("inf"):
            raise InvalidRequest(name, f"must be above 0 and finite, not {seconds:g}")
    given = {name: seconds for name, seconds in given.items() if seconds}
    if not given:
        raise InvalidRequest(
            "targets", "give a time to first token, a time per output token, or both"
        )
    targets = {**state.targets.get(order.slo_class, {}), **given}
    spoken = " and ".join(f"{name.split('_')[0].upper()} {s:g} s" for name, s in targets.items())
    return replace(state, targets={**state.targets, order.slo_class: targets}), (
        f"{order.slo_class}: {spoken} until `pdserve release --targets`"
    )


def _release(state: PlanState, order: Order) -> tuple[PlanState, str]:
    """A worker, a pool, a model's pools, the targets, or everything."""
    if order.everything:
        workers = tuple(replace(w, drained=False) for w in state.workers)
        return replace(state, workers=workers, manual={}, targets={}), "everything is released"
    if order.slo_class:
        left = {k: v for k, v in state.targets.items() if order.slo_class not in (k, "all")}
        if left == state.targets:
            raise NotFound("no target was set by hand")
        return replace(state, targets=left), "targets are the configuration's again"
    if order.worker_id:
        worker = _worker(state, order.worker_id)
        if not worker.drained:
            raise InvalidRequest("worker_id", f"{worker.worker_id} is not drained")
        workers = tuple(
            replace(w, drained=False) if w.worker_id == worker.worker_id else w
            for w in state.workers
        )
        state = _counted(replace(state, workers=workers), worker, +1)
        return state, f"{worker.worker_id} starts again"
    held = state.manual.get(order.model, {})
    gone = {role: n for role, n in held.items() if order.role in ("", role)}
    if not gone:
        raise NotFound(f"no pool of {order.model!r} is held by hand: `pdserve recommend` shows")
    rest = {role: n for role, n in held.items() if role not in gone}
    manual = {name: pools for name, pools in state.manual.items() if name != order.model}
    manual |= {order.model: rest} if rest else {}
    return replace(state, manual=manual), f"{order.model}: released {', '.join(sorted(gone))}"


def _check(config: Config, state: PlanState, model: ModelConfig, want: Counts, role: Role) -> None:
    """Raises InvalidRequest unless such numbers would serve and the budget has room for them."""
    if not want.total:
        raise InvalidRequest(role, f"{model.name} would have no worker left")
    prefill, decode = want.prefill + want.both, want.decode + want.both
    if config.placement.disaggregate == "always" and not (prefill and decode):
        raise InvalidRequest(
            role,
            f"{model.name} would be left without a {role} worker, and placement.disaggregate is "
            "always: flip or add one first",
        )
    most = policy_of(config, state, model).max_workers
    # While the planner acts it makes room in the pools that are not held.
    loose = config.planner.mode == "act"
    manual = {*state.manual.get(model.name, {}), role}
    least = config.planner.min_per_pool
    needed = sum(min(want.of(r), least) if loose and r not in manual else want.of(r) for r in ROLES)
    if needed > most and want.total > counts_of(state, model.name).total:
        raise InvalidRequest(
            role,
            f"{want} of {model.name} is over planner.budget, which has room for {most}: scale "
            "another pool down first, or raise the budget and `pdserve reload`",
        )


def _held(state: PlanState, model: str, pools: dict[str, int]) -> PlanState:
    held = {**state.manual.get(model, {}), **pools}
    return replace(state, manual={**state.manual, model: held})


def _counted(state: PlanState, worker: WantedWorker, more: int) -> PlanState:
    """Numbers that a person has set are of the workers that are not drained."""
    held = state.manual.get(worker.model, {})
    if worker.role not in held:
        return state
    return _held(state, worker.model, {worker.role: held[worker.role] + more})


def _model(config: Config, name: str) -> ModelConfig:
    if not name and len(config.models) == 1:
        return config.models[0]
    try:
        return config.model(name)
    except KeyError:
        known = ", ".join(model.name for model in config.models)
        raise NotFound(f"there is no model {name!r}; there are {known}") from None


def _worker(state: PlanState, worker_id: str) -> WantedWorker:
    for worker in state.workers:
        if worker.worker_id == worker_id:
            return worker
    known = ", ".join(worker.worker_id for worker in state.workers)
    raise NotFound(f"there is no worker {worker_id!r}; there are {known}")


def _role(name: str) -> Role:
    for role in ROLES:
        if role == name:
            return role
    raise InvalidRequest("role", f"{name!r} is none; they are {', '.join(ROLES)}")
