"""A virtual worker: an engine behind a role, and the view that the router has of it."""

from __future__ import annotations

from typing import Literal

from cluster.planner.performance import Performance
from cluster.simulator.engine import Engine, EngineLimits
from router.placement import Target, WorkerView

Role = Literal["prefill", "decode", "both"]
Phase = Literal["starting", "ready", "draining", "gone"]

MODEL = "m"
LAYOUT = "one"


class VirtualWorker:
    """One slot. A restart after a failure is a new incarnation with an empty engine.

    Attributes:
        egress_free_at: its link's handoffs leave one after another.
        gpu_seconds: counts from its start, cold start included.
    """

    def __init__(
        self,
        worker_id: str,
        role: Role,
        performance: Performance,
        limits: EngineLimits,
        block_tokens: int,
        started_at: float,
    ) -> None:
        self.worker_id = worker_id
        self.role: Role = role
        self.phase: Phase = "starting"
        self.wanted_role: Role | None = None
        self.started_at = started_at
        self.gone_at: float | None = None
        self.egress_free_at = 0.0
        self._performance = performance
        self._limits = limits
        self._block_tokens = block_tokens
        self._life = 0
        self._queued = self._running = self._reserved = 0
        self.engine = Engine(performance, limits, block_tokens)
        self._renew()

    @property
    def view(self) -> WorkerView:
        return self._view

    @property
    def queued_prompt_tokens(self) -> int:
        return self._queued

    @property
    def running_sequences(self) -> int:
        return self._running

    @property
    def unused(self) -> bool:
        """Nothing that the router sent is left on it."""
        return self._running == 0 and self._queued == 0 and self.engine.idle

    def become(self, phase: Phase, role: Role | None = None) -> None:
        self.phase = phase
        self.role = role or self.role
        self._renew()

    def reborn(self) -> None:
        """Its process died: all it held is gone."""
        self._life += 1
        self._queued = self._running = self._reserved = 0
        self.engine = Engine(self._performance, self._limits, self._block_tokens)
        self._renew()

    def loaded(self, queued: int = 0, running: int = 0, reserved: int = 0) -> None:
        """The router put something on it, or saw its end (negative)."""
        self._queued += queued
        self._running += running
        self._reserved += reserved

    def _renew(self) -> None:
        self._view = WorkerView(
            Target(self.worker_id, str(self._life)),
            MODEL,
            self.role,
            ready=self.phase == "ready",
            connected=self.phase in ("ready", "draining"),
            layout=LAYOUT,
            block_size=self._block_tokens,
            kv_tokens=self._performance.kv_capacity,
        )
