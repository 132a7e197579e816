"""Placement's values: what a sequence needs, who may run it, what was decided. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

Mode = Literal["auto", "always", "never"]
"""Whether prefill and decode are on two workers; auto: where that is predicted to be better."""


@dataclass(frozen=True)
class Target:
    """One life of one worker."""

    worker_id: str
    incarnation: str


@dataclass(frozen=True)
class WorkerView:
    """A worker as the router sees it.

    Attributes:
        kv_tokens: what its KV pool holds.
    """

    target: Target
    model: str
    role: str
    ready: bool
    connected: bool
    layout: str
    block_size: int = 1
    kv_tokens: int = 0

    def serves(self, model: str, role: str) -> bool:
        return self.model == model and self.role in (role, "both") and self.ready


@dataclass(frozen=True)
class Demand:
    """What a sequence needs.

    Attributes:
        decodes: it may go on after its first token.
        ttft_seconds, tpot_seconds: its targets.
        waited_seconds: of its time to first token, what is over already.
        held: prompt tokens that a worker's prefix cache holds, by slot of the fleet.
        avoid: ids of workers that failed it; taken only where there is no other.
    """

    model: str
    prompt_tokens: int
    max_tokens: int
    decodes: bool
    ttft_seconds: float = 2.0
    tpot_seconds: float = 0.1
    waited_seconds: float = 0.0
    held: Mapping[int, int] = field(default_factory=dict)
    avoid: frozenset[str] = frozenset()


class Plan(NamedTuple):
    """Prefill and decode; prefill alone, if one token is all; or one worker whole."""

    prefill: Target | None = None
    decode: Target | None = None
    whole: Target | None = None


class Candidate(NamedTuple):
    """One way to serve a sequence, and what is predicted of it.

    Attributes:
        slots: of the fleet: where the prompt is computed, where the rest; -1: nowhere.
        ttft_seconds: from now.
        uncached_tokens: prompt tokens that would be computed.
        prefill_seconds: of computing them.
        cost: what is compared: shares of the targets, its own and its neighbours'.
    """

    plan: Plan
    slots: tuple[int, int]
    ttft_seconds: float
    tpot_seconds: float
    uncached_tokens: int
    prefill_seconds: float
    cost: float


@dataclass(frozen=True)
class Decision:
    """What was chosen, and the best of what was not."""

    chosen: Candidate
    losers: tuple[Candidate, ...]

    @property
    def plan(self) -> Plan:
        return self.chosen.plan


@dataclass(frozen=True)
class Unplaced:
    """Nothing fits now; `missing` says what, for the error that the client may get."""

    missing: str


class Placement(Protocol):
    """Decides for one sequence, from the fleet as it is."""

    def place(self, now: float, demand: Demand) -> Decision | Unplaced: ...


def missing(model: str, view: Iterable[WorkerView], mode: Mode = "always") -> str:
    """What keeps `model` from being served, in words; empty if nothing does."""
    view = list(view)
    if mode != "always":
        return _missing_any(model, view)
    lacking = []
    for role in ("prefill", "decode"):
        serving = [w for w in view if w.serves(model, role)]
        if not serving:
            lacking.append(f"no ready {role} worker")
        elif not any(w.connected for w in serving):
            lacking.append(f"no connection to its {role} workers")
    if lacking:
        return f"model {model} has " + " and ".join(lacking)
    usable = [w for w in view if w.connected]
    prefill_layouts = {w.layout for w in usable if w.serves(model, "prefill")}
    decode_layouts = {w.layout for w in usable if w.serves(model, "decode")}
    if prefill_layouts & decode_layouts:
        return ""
    return f"model {model} has no prefill and decode worker with the same KV layout"


def _missing_any(model: str, view: Iterable[WorkerView]) -> str:
    ready = [w for w in view if w.model == model and w.ready]
    if not ready:
        return f"model {model} has no ready worker"
    if not any(w.connected for w in ready):
        return f"model {model} has no connection to its workers"
    return ""
