"""The router's joint placement in the simulated cluster: its own core and its own fleet."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Protocol

from cluster.planner.performance import Performance
from cluster.simulator.job import Attempt
from cluster.simulator.worker import MODEL, VirtualWorker
from cluster.simulator.workload import Arrival
from router.admission.offers import Capacity
from router.capacity import Paces
from router.events import Place
from router.fleet import Fleet
from router.joint import JointPlacement
from router.learn import shares_of
from router.output import Stage
from router.placement import Demand, Mode, Plan, Unplaced, WorkerView
from router.share import Share

LEARNED_SIZES = [2.0**k for k in range(4, 16)]
LEARNED_BATCHES = [2.0**k for k in range(9)]
CONTEXT = 1024


class Placing(Protocol):
    """Decides for one sequence, and is told what becomes of it."""

    def place(
        self, now: float, arrival: Arrival, place: Place, workers: Iterable[VirtualWorker]
    ) -> Plan | Unplaced: ...
    def paced(self, pools: Capacity) -> Capacity: ...
    def took(self, now: float, attempt: Attempt, stage: Stage) -> None: ...
    def answered(self, now: float, attempt: Attempt, stage: Stage) -> None: ...
    def released(self, now: float, attempt: Attempt, stage: Stage) -> None: ...


class RouterPlacing:
    """As the router does it, with speeds that it has learned exactly.

    Args:
        ttft, tpot: the targets that it weighs.
        mode: aggregated deployments never split; None: by the workers that are there.
    """

    def __init__(self, seed: int, ttft: float, tpot: float, mode: Mode | None = None) -> None:
        self._ttft, self._tpot = ttft, tpot
        self._mode = mode
        self._fleet = Fleet(prefix_blocks=1)
        self._paces = Paces(self._fleet, mode or "auto")
        rng = random.Random(seed)
        modes: tuple[Mode, ...] = ("auto", "always", "never")
        self._placements = {m: JointPlacement(self._fleet, m, rng) for m in modes}
        self._slots: dict[str, tuple[WorkerView, int]] = {}
        self._chosen: dict[Stage, Share] = {}
        self._shares: dict[tuple[str, Stage], Share] = {}

    def place(
        self, now: float, arrival: Arrival, place: Place, workers: Iterable[VirtualWorker]
    ) -> Plan | Unplaced:
        whole = self._follow(workers)
        demand = Demand(
            MODEL,
            arrival.prompt,
            arrival.output,
            decodes=arrival.output > 1,
            ttft_seconds=self._ttft,
            tpot_seconds=self._tpot,
            avoid=place.avoid,
        )
        mode = self._mode or ("never" if whole else "auto")
        decision = self._placements[mode].place(now, demand)
        if isinstance(decision, Unplaced):
            return decision
        self._chosen = shares_of(decision.chosen, arrival.prompt, float(arrival.output))
        return decision.plan

    def paced(self, pools: Capacity) -> Capacity:
        """With what the router knows and expects of their pace."""
        return self._paces.of(pools, MODEL)

    def took(self, now: float, attempt: Attempt, stage: Stage) -> None:
        """The sequence that was placed last starts on its worker."""
        share = self._chosen[stage]
        self._shares[attempt.sequence_id, stage] = share
        self._fleet.take(now, share)

    def answered(self, now: float, attempt: Attempt, stage: Stage) -> None:
        """Its first token has come from there."""
        if share := self._shares.get((attempt.sequence_id, stage)):
            self._fleet.answered(now, share)

    def released(self, now: float, attempt: Attempt, stage: Stage) -> None:
        """It has ended there."""
        share = self._shares.pop((attempt.sequence_id, stage), None)
        if share is not None and self._fleet.views[share.slot] is not None:
            self._fleet.release(now, share)

    def _follow(self, workers: Iterable[VirtualWorker]) -> bool:
        """Takes in who came, went or changed; True if all that serve have both roles."""
        whole = True
        for worker in workers:
            known = self._slots.get(worker.worker_id)
            if worker.phase == "ready":
                whole = whole and worker.role == "both"
            if known is not None and known[0] is worker.view:
                continue
            if known is not None and known[0].target != worker.view.target:
                self._leave(worker.worker_id)
                known = None
            if worker.phase == "gone":
                if known is not None:
                    self._leave(worker.worker_id)
            elif known is None:
                slot = self._fleet.join(worker.view)
                self._slots[worker.worker_id] = (worker.view, slot)
                self._learn(slot, worker.engine.performance)
            else:
                self._slots[worker.worker_id] = (worker.view, known[1])
                self._fleet.update(known[1], worker.view)
        return whole

    def _leave(self, worker_id: str) -> None:
        _, slot = self._slots.pop(worker_id)
        self._shares = {k: s for k, s in self._shares.items() if s.slot != slot}
        self._fleet.leave(slot)

    def _learn(self, slot: int, worker: Performance) -> None:
        for _ in range(3):  # the first sample moves every knot along: the next ones settle them
            for size in LEARNED_SIZES:
                tokens = int(size)
                seconds = worker.prefill_seconds(tokens)
                self._fleet.saw_prefill(slot, tokens, seconds)
                exposed = worker.exposed_handoff_seconds(tokens, seconds)
                self._fleet.saw_exposed(slot, tokens, exposed)
            for batch in LEARNED_BATCHES:
                step = worker.decode_seconds(int(batch), batch * CONTEXT)
                self._fleet.saw_step(slot, batch, step)
