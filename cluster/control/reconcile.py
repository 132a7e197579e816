"""Which lives to start and to end, from what is wanted and what is seen. Pure.

A slot is a place for one worker or router; a life is one process in it. The controller, not Ray,
restarts the dead: every life needs an incarnation of its own, a pause that grows, and an end to
trying, none of which Ray's `max_restarts` knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.config import Config, PoolConfig, WorkerPoolConfig

QUICK_SECONDS = 60.0
"""A life that was ready for less than this failed quickly."""
MAX_QUICK_FAILURES = 3
"""A slot that has never served is given up after so many in a row; one that has waits longer."""
FIRST_BACKOFF_SECONDS = 1.0
LONG_BACKOFF_SECONDS = 60.0
MAX_BACKOFF_SECONDS = 300.0

Kind = Literal["worker", "router"]
Phase = Literal["starting", "ready", "stopping"]


@dataclass(frozen=True)
class Slot:
    """A place for one worker or router.

    Attributes:
        slot_id: the worker id or router id.
        model, role: of a worker; empty for a router.
        pool: what it reserves, and where it may run.
        gpus: of a worker whose pool does not say, in a cluster that has some.
        node_type: of a worker: the part of the budget that it was started from, if it was.
    """

    kind: Kind
    slot_id: str
    model: str = ""
    role: str = ""
    pool: PoolConfig = field(default_factory=PoolConfig)
    gpus: int = 1
    node_type: str = ""

    @property
    def num_gpus(self) -> int | None:
        """What its pool says."""
        return self.pool.num_gpus if isinstance(self.pool, WorkerPoolConfig) else None


@dataclass(frozen=True)
class Life:
    """One process in a slot.

    Attributes:
        started_at: when it was asked for.
        placed_at: when it got its host; before that it waits, without limit, for one with room.
        role: of a worker, as it has registered it; empty before that.
        turns_at: it is told to take its slot's role from then on: now, or after a try that failed;
            None: it is being told.
    """

    incarnation: str
    phase: Phase
    started_at: float
    ready_at: float | None = None
    placed_at: float | None = None
    role: str = ""
    turns_at: float | None = 0.0


@dataclass(frozen=True)
class Lease:
    """A member that the registry shows."""

    kind: Kind
    slot_id: str
    incarnation: str


@dataclass(frozen=True)
class SlotState:
    """A slot as it is now.

    Attributes:
        failures: quick failures in a row.
        ended_at: when the last life ended.
        reason: why it ended.
        permanent: the reason will not go away by itself, such as a wrong configuration.
        served: a life of it was ready once, so that trying again has a chance.
        gave_up: the slot is left empty.
    """

    slot: Slot
    life: Life | None = None
    failures: int = 0
    ended_at: float | None = None
    reason: str = ""
    permanent: bool = False
    served: bool = False
    gave_up: bool = False

    def retry_at(self) -> float:
        """When the next life may start."""
        if self.ended_at is None:
            return float("-inf")
        return self.ended_at + backoff(self.failures)


@dataclass(frozen=True)
class Observed:
    """Everything reconcile sees."""

    slots: tuple[SlotState, ...]
    leases: tuple[Lease, ...] = ()


@dataclass(frozen=True)
class Start:
    """Start a life in the slot."""

    slot: Slot


@dataclass(frozen=True)
class Stop:
    """Drain the life, then end it."""

    slot_id: str
    incarnation: str


@dataclass(frozen=True)
class Turn:
    """Have the life take its slot's role; what runs on it goes on."""

    slot_id: str
    incarnation: str
    role: str


@dataclass(frozen=True)
class Kill:
    """End the life now."""

    slot_id: str
    incarnation: str
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """Leave the slot empty and say why."""

    slot_id: str
    reason: str


@dataclass(frozen=True)
class DropLease:
    """Remove a member whose process is gone, before its lease runs out."""

    lease: Lease


Action = Start | Stop | Turn | Kill | GiveUp | DropLease


def desired_slots(config: Config) -> tuple[Slot, ...]:
    """The slots that a configuration asks for."""
    slots = [
        Slot(
            "worker",
            worker_id(model.name, role, index),
            model.name,
            role,
            pool,
            model.tensor_parallel_size,
        )
        for model in config.models
        for role, pool in (("prefill", model.prefill), ("decode", model.decode))
        for index in range(pool.replicas)
    ]
    routers = (
        Slot("router", f"router-{index}", pool=config.router.pool)
        for index in range(config.router.pool.replicas)
    )
    return (*slots, *routers)


def worker_id(model: str, role: str, index: int) -> str:
    """A slot's name; the role is the one that it began with."""
    return f"{model.replace('/', '-')}-{role}-{index}"


def renewed(states: Mapping[str, SlotState], desired: Iterable[Slot]) -> dict[str, SlotState]:
    """The slots once others are wanted: every life stays, for `reconcile` to end where it must; an
    empty slot is forgotten, with all that was held against it."""
    fresh = {slot.slot_id: SlotState(slot) for slot in desired}
    living = {slot_id: state for slot_id, state in states.items() if state.life is not None}
    return fresh | living


def backoff(failures: int) -> float:
    """Seconds to wait after so many quick failures in a row; none after a long life. Each pause is
    twice the one before, and `MAX_QUICK_FAILURES` of them begin with a minute."""
    if failures == 0:
        return 0.0
    if failures < MAX_QUICK_FAILURES:
        return FIRST_BACKOFF_SECONDS * 2.0 ** (failures - 1)
    more = min(failures - MAX_QUICK_FAILURES, 16)
    return min(LONG_BACKOFF_SECONDS * 2.0**more, MAX_BACKOFF_SECONDS)


def ended(state: SlotState, now: float, reason: str, permanent: bool = False) -> SlotState:
    """The slot after its life ended on its own."""
    life = state.life
    quick = life is None or life.ready_at is None or now - life.ready_at < QUICK_SECONDS
    return replace(
        state,
        life=None,
        failures=state.failures + 1 if quick else 0,
        ended_at=now,
        reason=reason,
        permanent=permanent,
        served=state.served or (life is not None and life.ready_at is not None),
    )


def reconcile(
    now: float, desired: Iterable[Slot], observed: Observed, start_timeout: float = 900.0
) -> list[Action]:
    """What to do now, at most one action per slot. Calling it again before the actions took effect
    repeats them; the caller records a Start before the next call."""
    wanted = {slot.slot_id: slot for slot in desired}
    states = {state.slot.slot_id: state for state in observed.slots}
    actions: list[Action] = []
    for slot_id, slot in wanted.items():
        action = _fill(now, slot, states.get(slot_id, SlotState(slot)), start_timeout)
        if action is not None:
            actions.append(action)
    for slot_id, state in states.items():
        if slot_id not in wanted and state.life is not None and state.life.phase != "stopping":
            actions.append(Stop(slot_id, state.life.incarnation))
    lives = {
        (state.slot.kind, slot_id, state.life.incarnation)
        for slot_id, state in states.items()
        if state.life is not None
    }
    actions += [
        DropLease(lease)
        for lease in observed.leases
        if (lease.kind, lease.slot_id, lease.incarnation) not in lives
    ]
    return actions


def _fill(now: float, slot: Slot, state: SlotState, start_timeout: float) -> Action | None:
    life = state.life
    if life is not None and life.phase == "ready" and life.role not in ("", slot.role):
        due = life.turns_at is not None and now >= life.turns_at
        return Turn(slot.slot_id, life.incarnation, slot.role) if due else None
    if life is not None:
        placed = life.placed_at is not None and life.phase == "starting"
        late = placed and now - (life.placed_at or 0.0) > start_timeout
        reason = f"was not ready within lifecycle.start_timeout_seconds ({start_timeout:g} s)"
        return Kill(slot.slot_id, life.incarnation, reason) if late else None
    if state.gave_up:
        return None
    if state.permanent or (state.failures >= MAX_QUICK_FAILURES and not state.served):
        return GiveUp(slot.slot_id, state.reason)
    return Start(slot) if now >= state.retry_at() else None
