"""What the controller tells about its slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from cluster.control.reconcile import MAX_QUICK_FAILURES, Kind, SlotState, backoff
from cluster.store.plan_records import WaitingWorker
from cluster.store.registry import Members

State = Literal["waiting", "starting", "ready", "stopping", "failed", "empty"]


@dataclass(frozen=True)
class SlotStatus:
    """A slot, for people.

    Attributes:
        state: waiting (for another try or for resources), starting, ready, stopping, failed (given
            up) or empty.
        seconds: how long the life has been alive, or how long ago the last one ended.
        detail: what it waits for or why it failed.
        host, pid, log: of the life's process, once it is there; `host` is empty in an embedded
            cluster, where there is only one.
        log_tail: the last lines of the last life's log.
        grpc_address, http_address, operator_address: of a router that is ready.
    """

    slot_id: str
    kind: Kind
    role: str
    state: State
    seconds: float
    incarnation: str = ""
    failures: int = 0
    detail: str = ""
    pid: int = 0
    grpc_address: str = ""
    http_address: str = ""
    operator_address: str = ""
    host: str = ""
    log: str = ""
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClusterStatus:
    """All slots.

    Attributes:
        store_reachable: False while readiness cannot be seen.
        needs_config: Ray has restarted the controller: it starts nothing before it is told the
            configuration again, as reloaded since.
    """

    store_reachable: bool
    stopping: bool
    slots: tuple[SlotStatus, ...]
    needs_config: bool = False

    @property
    def ready(self) -> bool:
        """Every slot serves."""
        return all(slot.state == "ready" for slot in self.slots)

    @property
    def failed(self) -> tuple[SlotStatus, ...]:
        """The slots that were given up."""
        return tuple(slot for slot in self.slots if slot.state == "failed")


class Place(Protocol):
    """Where a life's process is. As `actors.Where`, which is not imported: it needs Ray."""

    @property
    def host(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def log(self) -> Path: ...


class Running(Protocol):
    """What a running life says of itself."""

    @property
    def where(self) -> Place | None:
        """None until it has its process."""
        ...

    def waits_for(self) -> str:
        """The resources it waits for; empty once it has its host."""
        ...


def slot_status(
    now: float,
    state: SlotState,
    running: Running | None,
    members: Members | None,
    log_tail: tuple[str, ...] = (),
) -> SlotStatus:
    """The slot's status, with what its own record in the registry adds."""
    slot, life = state.slot, state.life
    if life is None:
        return SlotStatus(
            slot.slot_id,
            slot.kind,
            slot.role,
            "failed" if state.gave_up else "waiting" if state.reason else "empty",
            now - state.ended_at if state.ended_at is not None else 0.0,
            failures=state.failures,
            detail=state.reason if state.gave_up else _retry(state),
            log_tail=log_tail,
        )
    waits = running.waits_for() if running is not None else ""
    where = running.where if running is not None else None
    detail, addresses = waits, ("", "", "")
    if members is not None and slot.kind == "worker":
        for worker in members.workers:
            if (worker.worker_id, worker.incarnation) == (slot.slot_id, life.incarnation):
                detail = worker.detail or waits
    elif members is not None:
        for router in members.routers:
            if (router.router_id, router.incarnation) == (slot.slot_id, life.incarnation):
                operator = router.operator_address or router.grpc_address
                addresses = (router.grpc_address, router.http_address, operator)
    return SlotStatus(
        slot.slot_id,
        slot.kind,
        slot.role,
        "waiting" if waits else life.phase,
        now - life.started_at,
        life.incarnation,
        state.failures,
        detail,
        where.pid if where else 0,
        *addresses,
        where.host if where else "",
        str(where.log) if where else "",
    )


def waiting_workers(
    now: float, slots: Mapping[str, SlotState], lives: Mapping[str, Running], members: Members
) -> tuple[WaitingWorker, ...]:
    """The workers that are wanted and have not registered."""
    known = {worker.worker_id for worker in members.workers}
    told = []
    for slot_id, state in sorted(slots.items()):
        if state.slot.kind == "worker" and slot_id not in known:
            status = slot_status(now, state, lives.get(slot_id), None)
            if status.state != "empty":
                told.append(
                    WaitingWorker(
                        slot_id, state.slot.model, state.slot.role, status.state, status.detail
                    )
                )
    return tuple(told)


def _retry(state: SlotState) -> str:
    if not state.reason:
        return ""
    pause = backoff(state.failures)
    end = "" if state.served else f" of {MAX_QUICK_FAILURES}"
    return f"{state.reason}; try {state.failures + 1}{end} after {pause:g} s"
