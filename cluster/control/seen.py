"""The workers as the planner sees them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import Config
from cluster.control.reconcile import SlotState
from cluster.control.wanted import charged
from cluster.planner.state import WorkerSeen
from cluster.store.plan_records import PlanState


def seen_workers(
    now: float, config: Config, state: PlanState, slots: Iterable[SlotState]
) -> dict[str, list[WorkerSeen]]:
    """By model: wanted workers as they are, and those that are still to go. A worker that changes
    its role counts in the new one: it serves there soon. One that ends and is wanted again – it
    was released, or its host leaves – is as good as starting: it begins anew where it is."""
    wanted = {w.worker_id: w for w in state.workers if not w.drained}
    living = {s.slot.slot_id: s for s in slots if s.slot.kind == "worker"}
    seen: dict[str, list[WorkerSeen]] = {model.name: [] for model in config.models}
    for name, worker in wanted.items():
        slot = living.get(name)
        life = slot.life if slot else None
        phase, since, loads = "starting", now, False
        if life is None:
            since = slot.ended_at if slot and slot.ended_at is not None else now
        elif life.phase == "starting":
            since, loads = life.started_at, life.placed_at is not None
        elif life.phase == "ready":
            phase, since = "ready", life.ready_at or 0.0
        kind = charged(config, worker.node_type)
        seen[worker.model].append(
            WorkerSeen(name, worker.role, phase, since, kind, loads)  # type: ignore[arg-type]
        )
    for name, slot in living.items():
        if name not in wanted and slot.life is not None and slot.slot.model in seen:
            role, since = slot.slot.role, slot.life.started_at
            kind = charged(config, slot.slot.node_type)
            seen[slot.slot.model].append(WorkerSeen(name, role, "draining", since, kind))  # type: ignore[arg-type]
    return seen
