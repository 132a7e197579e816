"""What the planner sees, what it is to reach, and what it decides. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.planner.demand import Lengths

Role = Literal["prefill", "decode", "both"]
NOT_NEEDED = "not needed"
OVER_BUDGET = "over the budget"
ROLES: tuple[Role, ...] = ("prefill", "decode", "both")


@dataclass(frozen=True)
class Counts:
    """Workers by role."""

    prefill: int = 0
    decode: int = 0
    both: int = 0

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.both

    def of(self, role: Role) -> int:
        return {"prefill": self.prefill, "decode": self.decode, "both": self.both}[role]

    def __str__(self) -> str:
        parts = [f"{self.of(role)} {role}" for role in ROLES if self.of(role)]
        return " + ".join(parts) or "none"


@dataclass(frozen=True)
class ClassTargets:
    """Of one class of requests: seconds, and the share of its requests that is to meet both."""

    ttft: float
    tpot: float
    share: float = 0.9


@dataclass(frozen=True)
class WorkerSeen:
    """One worker.

    Attributes:
        since: when this phase began, on the planner's clock.
        node_type: which part of the budget it takes.
        loads: it starts, and has its host: it waits for no node.
    """

    worker_id: str
    role: Role
    phase: Literal["starting", "ready", "draining"]
    since: float = 0.0
    node_type: str = "default"
    loads: bool = False

    @property
    def waits(self) -> bool:
        """It starts, and has no host yet or failed."""
        return self.phase == "starting" and not self.loads


@dataclass(frozen=True)
class Traffic:
    """One class's arrivals since the last observation, admitted or refused.

    Attributes:
        rate: requests/s; NaN where it could not be measured.
        lengths: of these requests, or of some of them.
        burstiness: variance over mean squared of the gaps between arrivals.
    """

    rate: float
    lengths: tuple[Lengths, ...] = ()
    burstiness: float = 1.0


@dataclass(frozen=True)
class Observed:
    """The cluster at one moment.

    Attributes:
        measured_at: when the traffic was measured, on the planner's clock.
        queued_prompt_tokens: that arrived and are not computed yet: the backlog.
    """

    workers: tuple[WorkerSeen, ...]
    traffic: Mapping[str, Traffic]
    measured_at: float
    queued_prompt_tokens: float = 0.0


@dataclass(frozen=True)
class Policy:
    """How the planner may act.

    Attributes:
        budget: GPUs by node type, in order of preference.
        worker_gpus: that one worker takes.
        minimum: workers that each pool in use keeps.
        max_step: workers added, flipped or removed in one decision, each.
        cold_start: seconds until an added worker serves.
        interval: seconds between decisions.
        down_after: seconds that a pool must have been too large before it shrinks.
        recover_within: seconds in which a backlog is to be worked off.
        headroom: standard deviations of the forecast's error that are planned for.
        mode_gain: share of the workers that a change between split and aggregated must save.
        stale_after: seconds after which a measurement is none.
        disaggregate: whether prefill and decode may, must or must not be on two workers.
    """

    budget: Mapping[str, int]
    worker_gpus: int = 1
    minimum: int = 1
    max_step: int = 8
    cold_start: float = 60.0
    interval: float = 5.0
    down_after: float = 180.0
    recover_within: float = 15.0
    headroom: float = 1.0
    mode_gain: float = 0.15
    stale_after: float = 30.0
    disaggregate: Literal["auto", "always", "never"] = "auto"

    @property
    def max_workers(self) -> int:
        return sum(gpus // self.worker_gpus for gpus in self.budget.values())


@dataclass(frozen=True)
class Shortfall:
    """A target that the budget cannot reach.

    Attributes:
        predicted: attainment with the best use of the whole budget.
        excess: seconds by which the share's percentile misses; infinite when the queue grows.
    """

    kind: str
    metric: Literal["ttft", "tpot"]
    target: float
    predicted: float
    excess: float


@dataclass(frozen=True)
class Flip:
    """A worker takes another role; its weights stay loaded."""

    worker_id: str
    role: Role


@dataclass(frozen=True)
class Add:
    """A worker is started."""

    role: Role
    node_type: str


@dataclass(frozen=True)
class Remove:
    """A worker is drained and ended."""

    worker_id: str
    reason: str = NOT_NEEDED


Action = Flip | Add | Remove


@dataclass(frozen=True)
class Decision:
    """What to do now, and why.

    Attributes:
        target: counts after all actions, and after what is on its way.
        needed: counts that the forecast asks for, before budget, hysteresis and holds.
        held: why nothing is changed, where that is so; else empty.
        reasons: in order of thought, for people.
        inputs: the figures that the reasons rest on.
    """

    at: float
    target: Counts
    needed: Counts
    actions: tuple[Action, ...] = ()
    held: str = ""
    reasons: tuple[str, ...] = ()
    shortfalls: tuple[Shortfall, ...] = ()
    inputs: Mapping[str, float] = field(default_factory=dict)
