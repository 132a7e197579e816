"""What the registry, and the plan, say of the slots. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from cluster.control.reconcile import Lease, Slot, SlotState
from cluster.store.registry import Members


def as_registered(
    now: float, slots: Mapping[str, SlotState], members: Members
) -> dict[str, SlotState]:
    """The slots whose life has become ready, or has another role: by its own record."""
    ready = {
        *((w.worker_id, w.incarnation) for w in members.workers if w.state == "ready"),
        *((r.router_id, r.incarnation) for r in members.routers if r.state == "ready"),
    }
    roles = {(w.worker_id, w.incarnation): w.role for w in members.workers}
    changed = {}
    for slot_id, state in slots.items():
        life = state.life
        if life is None:
            continue
        key = (slot_id, life.incarnation)
        after = replace(life, role=roles.get(key, life.role))
        if life.phase == "starting" and key in ready:
            after = replace(after, phase="ready", ready_at=now)
        if after != life:
            changed[slot_id] = replace(state, life=after)
    return changed


def as_placed(
    now: float, slots: Mapping[str, SlotState], placed: Iterable[str]
) -> dict[str, SlotState]:
    """The slots whose life has got its host since."""
    changed = {}
    for slot_id in placed:
        state = slots[slot_id]
        if state.life is not None and state.life.placed_at is None:
            changed[slot_id] = replace(state, life=replace(state.life, placed_at=now))
    return changed


def as_wanted(slots: Mapping[str, SlotState], wanted: Iterable[Slot]) -> dict[str, SlotState]:
    """All wanted slots, with what is known of them; others while something lives in them."""
    after = {slot_id: state for slot_id, state in slots.items() if state.life is not None}
    for slot in wanted:
        after[slot.slot_id] = replace(slots.get(slot.slot_id, SlotState(slot)), slot=slot)
    return after


def leases(members: Members | None) -> tuple[Lease, ...]:
    """Of all members; none while they cannot be seen."""
    if members is None:
        return ()
    return (
        *(Lease("worker", w.worker_id, w.incarnation) for w in members.workers),
        *(Lease("router", r.router_id, r.incarnation) for r in members.routers),
    )
