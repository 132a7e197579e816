"""The simulated workers' lives: cold starts, drains, role flips, failures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.planner.performance import Performance
from cluster.simulator.engine import EngineLimits
from cluster.simulator.events import Agenda
from cluster.simulator.worker import Role, VirtualWorker
from router.placement import Mode

FLIP_SECONDS = 0.5
"""A drained worker registers under its new role; the weights stay where they are."""


@dataclass(frozen=True)
class Deployment:
    """The workers at the start, and what they are.

    Attributes:
        decode_performance: of decode workers, where their layout is another than prefill's.
        cold_start: seconds from a worker's start to its readiness.
        max_running, max_queued: the router's limits.
        timeout: of every request, seconds.
        start_within: seconds until a request's first token is due: admission refuses it when that
            cannot be; infinite: it waits.
        pace_within: seconds per token that admission keeps to, as the router does by a class's
            target: no more decode at once than that; infinite: whatever the pace.
        placement_mode: unset: never split where every worker has both roles, else as is better.
        ttft, tpot: targets that placement weighs, seconds.
        late_admission: requests wait in the router until the workers have room, as pdserve's do;
            if not, they are placed at once and wait there, as other systems' do.
    """

    performance: Performance
    prefill: int = 0
    decode: int = 0
    both: int = 0
    limits: EngineLimits = field(default_factory=EngineLimits)
    decode_performance: Performance | None = None
    block_tokens: int = 512
    cold_start: float = 60.0
    max_running: int = 1 << 20
    max_queued: int = 1 << 20
    timeout: float = 600.0
    start_within: float = math.inf
    pace_within: float = math.inf
    late_admission: bool = True
    placement_mode: Mode | None = None
    ttft: float = 2.0
    tpot: float = 0.1

    @property
    def gpus(self) -> int:
        decode = self.decode_performance or self.performance
        return (self.prefill + self.both) * self.performance.gpus + self.decode * decode.gpus

    def __str__(self) -> str:
        if self.both:
            return f"{self.both} aggregated"
        return f"{self.prefill}P:{self.decode}D"


class Fleet:
    """Who lives, and in which role.

    Attributes:
        on_change: is called when a worker becomes ready, or is ready no longer.
        on_lost: is called with a worker that dies, before its engine is replaced.
    """

    def __init__(self, deployment: Deployment, agenda: Agenda) -> None:
        self.deployment = deployment
        self.workers: dict[str, VirtualWorker] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.on_lost: Callable[[VirtualWorker], None] = lambda worker: None
        self._agenda = agenda
        self._started = 0
        pools: tuple[tuple[Role, int], ...] = (
            ("prefill", deployment.prefill),
            ("decode", deployment.decode),
            ("both", deployment.both),
        )
        for role, number in pools:
            for _ in range(number):
                self.add(role, ready_after=0.0)

    def living(self) -> list[VirtualWorker]:
        """All that take GPUs."""
        return [w for w in self.workers.values() if w.phase != "gone"]

    def gpu_seconds(self) -> float:
        """Of all workers so far, from their start to their end."""
        total = 0.0
        for worker in self.workers.values():
            end = self._agenda.now if worker.gone_at is None else worker.gone_at
            total += (end - worker.started_at) * worker.engine.performance.gpus
        return total

    def add(self, role: Role, ready_after: float | None = None) -> VirtualWorker:
        """Starts a worker; it is ready after its cold start, or after `ready_after`."""
        deployment = self.deployment
        performance = deployment.performance
        if role == "decode" and deployment.decode_performance is not None:
            performance = deployment.decode_performance
        self._started += 1
        worker = VirtualWorker(
            f"w{self._started}",
            role,
            performance,
            deployment.limits,
            deployment.block_tokens,
            self._agenda.now,
        )
        self.workers[worker.worker_id] = worker
        wait = deployment.cold_start if ready_after is None else ready_after
        if wait > 0:
            self._agenda.after(wait, lambda: self._ready(worker))
        else:
            worker.become("ready")
        return worker

    def remove(self, worker: VirtualWorker) -> None:
        """Drains the worker, then ends it; one that still starts ends at once."""
        worker.wanted_role = None
        if worker.phase == "starting":
            self._gone(worker)
        elif worker.phase != "gone":
            worker.become("draining")
            self.on_change()
            self.unused(worker)

    def flip(self, worker: VirtualWorker, role: Role) -> None:
        """Drains the worker, then it serves in another role."""
        if worker.phase == "starting":
            worker.become("starting", role)
        elif worker.phase != "gone":
            worker.wanted_role = role
            worker.become("draining")
            self.on_change()
            self.unused(worker)

    def fail(self, worker: VirtualWorker, restart_after: float | None) -> None:
        """Its process dies now; a new life starts, or none."""
        if worker.phase == "gone":
            return
        worker.become("gone" if restart_after is None else "starting")
        self.on_change()
        self.on_lost(worker)
        worker.reborn()
        if restart_after is None:
            worker.gone_at = self._agenda.now
        else:
            self._agenda.after(restart_after, lambda: self._ready(worker))

    def unused(self, worker: VirtualWorker) -> None:
        """A draining worker with nothing left on it ends, or takes its new role."""
        if worker.phase != "draining" or not worker.unused:
            return
        if worker.wanted_role is None:
            self._gone(worker)
            return
        worker.become("starting", worker.wanted_role)
        worker.wanted_role = None
        self._agenda.after(FLIP_SECONDS, lambda: self._ready(worker))

    def _ready(self, worker: VirtualWorker) -> None:
        if worker.phase == "starting":
            worker.become("ready")
            self.on_change()

    def _gone(self, worker: VirtualWorker) -> None:
        worker.become("gone")
        worker.gone_at = self._agenda.now
