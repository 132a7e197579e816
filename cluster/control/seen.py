"""The workers as the planner sees them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import Config
from cluster.control.reconcile import SlotState
from cluster.planner.state import WorkerSeen
from cluster.store.plan_records import PlanState


def seen_workers(
    now: float, config: Config, state: PlanState, slots: Iterable[SlotState]
) -> dict[str, list[WorkerSeen]]:
    """By model: wanted workers as they are, and those that are still to go. A worker that changes
    its role counts in the new one: it serves there soon."""
    wanted = {w.worker_id: w for w in state.workers if not w.drained}
    first = config.planner.budget[0].name if config.planner.budget else "default"
    living = {s.slot.slot_id: s for s in slots if s.slot.kind == "worker"}
    seen: dict[str, list[WorkerSeen]] = {model.name: [] for model in config.models}
    for name, worker in wanted.items():
        slot = living.get(name)
        life = slot.life if slot else None
        ended = slot.ended_at if slot else None
        kind = worker.node_type or first
        if life is None:
            each = WorkerSeen(name, worker.role, "starting", now if ended is None else ended, kind)  # type: ignore[arg-type]
        else:
            since = life.ready_at if life.phase == "ready" else life.started_at
            phase = "draining" if life.phase == "stopping" else life.phase
            each = WorkerSeen(name, worker.role, phase, since or 0.0, kind)  # type: ignore[arg-type]
        seen[worker.model].append(each)
    for name, slot in living.items():
        if name not in wanted and slot.life is not None and slot.slot.model in seen:
            role = slot.slot.role
            since = slot.life.started_at
            seen[slot.slot.model].append(WorkerSeen(name, role, "draining", since, first))  # type: ignore[arg-type]
    return seen
