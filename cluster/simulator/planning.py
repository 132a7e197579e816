"""The planner in the simulated cluster: it sees what a controller would see, and is obeyed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cluster.planner.actions import counted, serving
from cluster.planner.demand import Lengths
from cluster.planner.state import (
    Action,
    Add,
    Counts,
    Decision,
    Flip,
    Observed,
    Remove,
    Traffic,
    WorkerSeen,
)
from cluster.simulator.outcome import Outcome
from cluster.simulator.worker import VirtualWorker
from cluster.simulator.workload import Arrival
from cluster.simulator.world import World

CACHED_GAIN = 0.02
"""Weight of the latest request in the share of prompts that caches are taken to hold."""


class Decider(Protocol):
    """A planner, or what it is compared with."""

    def step(self, now: float, observed: Observed) -> Decision: ...


@dataclass(frozen=True)
class Moment:
    """One decision and the workers it was taken over: kept for reports.

    Attributes:
        serving: those that are ready.
        have: those that serve or will.
    """

    at: float
    serving: Counts
    have: Counts
    decision: Decision


@dataclass
class Faults:
    """What a scenario makes go wrong. Workers it names `stuck` never become ready.

    Attributes:
        blind: traffic is not measured: the last measurement is repeated, with its old stamp.
        nan: traffic is measured as NaN.
        clock_offset: seconds that the planner's clock is off.
    """

    blind: bool = False
    nan: bool = False
    stuck_adds: bool = False
    clock_offset: float = 0.0


@dataclass
class Controller:
    """Steps a decider every `interval` and carries its actions out on the world's fleet.

    Attributes:
        kinds: of requests, whose traffic is told apart.
    """

    world: World
    decider: Decider
    interval: float
    kinds: tuple[str, ...] = ("",)
    faults: Faults = field(default_factory=Faults)
    moments: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._seen: dict[str, list[Lengths]] = {kind: [] for kind in self.kinds}
        self._since: dict[str, tuple[str, float]] = {}
        self._cached: dict[str, float] = {}
        self._last: tuple[Mapping[str, Traffic], float] | None = None
        self.world.on_arrival = self._arrived
        self.world.on_end = self._ended
        self.world.agenda.after(self.interval, self._step)

    def _arrived(self, arrival: Arrival) -> None:
        cached = round(arrival.prompt * self._cached.get(arrival.kind, 0.0))
        self._seen[arrival.kind].append(Lengths(arrival.prompt, arrival.output, cached))

    def _ended(self, outcome: Outcome) -> None:
        """What caches hold of a prompt is told by those that ended of late."""
        if not outcome.error:
            share, before = outcome.cached / outcome.prompt, self._cached.get(outcome.kind, 0.0)
            self._cached[outcome.kind] = before + CACHED_GAIN * (share - before)

    def _step(self) -> None:
        now = self.world.agenda.now
        observed = self.observe()
        decision = self.decider.step(now + self.faults.clock_offset, observed)
        living = [w for w in self.world.fleet.living() if w.phase == "ready"]
        self.moments.append(
            Moment(now, counts_of(living), counted(serving(observed.workers)), decision)
        )
        for action in decision.actions:
            self._act(action)
        self.world.agenda.after(self.interval, self._step)

    def observe(self) -> Observed:
        """The fleet as it is, and the traffic since the last look."""
        now = self.world.agenda.now + self.faults.clock_offset
        if self.faults.blind and self._last is not None:
            traffic, measured_at = self._last
        else:
            traffic = {
                kind: Traffic(len(seen) / self.interval, tuple(seen[-256:]))
                for kind, seen in self._seen.items()
            }
            measured_at = now
        self._seen = {kind: [] for kind in self._seen}
        self._last = (traffic, measured_at)
        if self.faults.nan:
            traffic = {kind: Traffic(float("nan")) for kind in traffic}
        workers = tuple(self._worker(w) for w in self.world.fleet.living())
        return Observed(workers, traffic, measured_at, self.world.queued_prompt_tokens)

    def _worker(self, worker: VirtualWorker) -> WorkerSeen:
        phase = "starting" if worker.phase == "starting" else worker.phase
        key = f"{phase}/{worker.role}"
        before = self._since.get(worker.worker_id)
        if before is None or before[0] != key:
            start = self.world.agenda.now if before else worker.started_at
            self._since[worker.worker_id] = before = (key, start)
        assert phase != "gone"
        role = worker.wanted_role or worker.role
        # A worker on its way to another role serves there soon; one that ends does not.
        shown = "ready" if phase == "draining" and worker.wanted_role else phase
        return WorkerSeen(worker.worker_id, role, shown, before[1] + self.faults.clock_offset)

    def _act(self, action: Action) -> None:
        fleet = self.world.fleet
        match action:
            case Add(role, _):
                fleet.add(role, ready_after=1e12 if self.faults.stuck_adds else None)
            case Flip(worker_id, role):
                fleet.flip(fleet.workers[worker_id], role)
            case Remove(worker_id, _):
                fleet.remove(fleet.workers[worker_id])


def counts_of(workers: list[VirtualWorker]) -> Counts:
    """Workers by role."""
    roles = [w.role for w in workers]
    return Counts(roles.count("prefill"), roles.count("decode"), roles.count("both"))
