"""What the store holds of planning: what was set, what was decided and why, what operators ask for.
Plain records, JSON on the wire; numbers of workers are by role."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Numbers = dict[str, int]


@dataclass(frozen=True)
class WantedWorker:
    """A worker's slot as it is wanted.

    Attributes:
        pool: role of the pool whose resources and labels it has; a flip does not change them.
        node_type: of the budget; empty for one of the configuration's own.
        drained: a person has taken it out: nothing runs in it until it is released.
    """

    worker_id: str
    model: str
    role: str
    pool: str
    node_type: str = ""
    drained: bool = False


@dataclass(frozen=True)
class PlanState:
    """What people and the planner have set.

    Attributes:
        base: by model: the configuration's replicas that `workers` began with.
        manual: by model: numbers that a person has set.
        targets: by class: ttft_seconds and tpot_seconds that a person has set.
        done: by model and kind (flips, added, removed): what was done so far.
    """

    base: dict[str, Numbers] = field(default_factory=dict)
    workers: tuple[WantedWorker, ...] = ()
    manual: dict[str, Numbers] = field(default_factory=dict)
    targets: dict[str, dict[str, float]] = field(default_factory=dict)
    done: dict[str, Numbers] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str) -> PlanState:
        values = json.loads(raw)
        workers = tuple(WantedWorker(**worker) for worker in values.pop("workers"))
        return cls(workers=workers, **values)


@dataclass(frozen=True)
class ActionRecord:
    """One step: `kind` is flip, add or remove."""

    kind: Literal["flip", "add", "remove"]
    worker_id: str
    role: str = ""
    node_type: str = ""
    reason: str = ""


@dataclass(frozen=True)
class ShortfallRecord:
    """A target out of reach. As `planner.state.Shortfall`."""

    kind: str
    metric: str
    target: float
    predicted: float
    excess: float


@dataclass(frozen=True)
class DecisionRecord:
    """One decision, with what it rests on.

    Attributes:
        number: of the model's decisions, ascending.
        at: seconds since 1970.
        source: planner, or operator for what a person asked for.
        acted: its actions were carried out; a recommendation's are not.
    """

    number: int
    at: float
    model: str
    source: Literal["planner", "operator"]
    acted: bool
    have: Numbers
    target: Numbers
    needed: Numbers
    actions: tuple[ActionRecord, ...] = ()
    held: str = ""
    reasons: tuple[str, ...] = ()
    shortfalls: tuple[ShortfallRecord, ...] = ()
    inputs: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str) -> DecisionRecord:
        return cls.from_values(json.loads(raw))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> DecisionRecord:
        actions = tuple(ActionRecord(**each) for each in values.pop("actions"))
        shortfalls = tuple(ShortfallRecord(**each) for each in values.pop("shortfalls"))
        reasons = tuple(values.pop("reasons"))
        return cls(actions=actions, shortfalls=shortfalls, reasons=reasons, **values)


@dataclass(frozen=True)
class ModelPlan:
    """One model's plan.

    Attributes:
        serving: workers that are ready, by their registered role.
        wanted: slots by role, those of drained workers not counted.
        attainment: by class: share of the requests ended of late; absent where there were none.
        errors: of the performance model, relative, by step (prefill, decode); absent: not known.
        performance: what it was made from.
    """

    model: str
    serving: Numbers
    wanted: Numbers
    manual: Numbers
    drained: tuple[str, ...]
    targets: dict[str, dict[str, float]]
    attainment: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    done: Numbers = field(default_factory=dict)
    performance: str = ""
    decision: DecisionRecord | None = None


@dataclass(frozen=True)
class PlanView:
    """The plan as the controller last wrote it, at `at` seconds since 1970."""

    at: float
    mode: str
    models: tuple[ModelPlan, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str) -> PlanView:
        values = json.loads(raw)
        models = []
        for each in values["models"]:
            decision = each.pop("decision")
            drained = tuple(each.pop("drained"))
            known = DecisionRecord.from_values(decision) if decision else None
            models.append(ModelPlan(decision=known, drained=drained, **each))
        return cls(values["at"], values["mode"], tuple(models))


@dataclass(frozen=True)
class WaitingWorker:
    """A worker that is wanted and has not registered.

    Attributes:
        state: waiting (for a host, or for another try), starting or failed.
        detail: what it waits for, or why it failed.
    """

    worker_id: str
    model: str
    role: str
    state: str
    detail: str


@dataclass(frozen=True)
class Order:
    """What an operator asks of the controller. Which fields count depends on `kind`.

    Attributes:
        ttft_seconds, tpot_seconds: 0: as it is.
        everything: of a release.
    """

    kind: Literal["scale", "flip", "drain", "release", "targets"]
    model: str = ""
    role: str = ""
    workers: int = 0
    worker_id: str = ""
    slo_class: str = ""
    ttft_seconds: float = 0.0
    tpot_seconds: float = 0.0
    everything: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str) -> Order:
        return cls(**json.loads(raw))


@dataclass(frozen=True)
class Reply:
    """What came of an order: what was done, or a gRPC code and why not."""

    said: str = ""
    code: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, raw: str) -> Reply:
        return cls(**json.loads(raw))
