"""Placement: which workers a sequence runs on. Pure; behind a seam that cost models can fill."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Protocol


@dataclass(frozen=True)
class Target:
    """One life of one worker."""

    worker_id: str
    incarnation: str


@dataclass(frozen=True)
class Load:
    """What this router has put on a worker and not seen the end of.

    Attributes:
        queued_prompt_tokens: of sequences whose first token has not come yet.
        running_sequences: decoding or about to.
        reserved_tokens: prompt and output tokens these may come to hold.
    """

    queued_prompt_tokens: int = 0
    running_sequences: int = 0
    reserved_tokens: int = 0


@dataclass(frozen=True)
class WorkerView:
    """A worker as the router sees it."""

    target: Target
    model: str
    role: str
    ready: bool
    connected: bool
    layout: str
    load: Load = Load()
    geometry: str = ""

    def serves(self, model: str, role: str) -> bool:
        return self.model == model and self.role in (role, "both") and self.ready


@dataclass(frozen=True)
class Demand:
    """What a sequence needs.

    Attributes:
        decodes: it may go on after its first token.
        avoid: ids of workers that failed it; taken only where there is no other.
    """

    model: str
    prompt_tokens: int
    max_tokens: int
    decodes: bool
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """Prefill and decode; prefill alone, if one token is all; or one worker whole."""

    prefill: Target | None = None
    decode: Target | None = None
    whole: Target | None = None


@dataclass(frozen=True)
class Unplaced:
    """Nothing fits now; `missing` says what, for the error that the client may get."""

    missing: str


class Placement(Protocol):
    """Decides for one sequence, from the view of that moment."""

    def place(self, demand: Demand, view: Sequence[WorkerView]) -> Plan | Unplaced: ...


class LeastLoaded:
    """The prefill worker with the least queued, the decode worker with the least running.

    Args:
        rng: breaks ties, so that routers that see the same do not all choose the same.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def place(self, demand: Demand, view: Sequence[WorkerView]) -> Plan | Unplaced:
        prefills = [w for w in view if w.connected and w.serves(demand.model, "prefill")]
        decodes = [w for w in view if w.connected and w.serves(demand.model, "decode")]
        prefill_cost = {w.target: self._prefill_cost(demand, w) for w in prefills}
        decode_cost = {w.target: self._decode_cost(demand, w) for w in decodes}
        if not demand.decodes and prefills:
            return Plan(prefill=min(prefill_cost, key=prefill_cost.__getitem__))
        pairs: list[tuple[Target, Target]] = []
        for layout in {w.layout for w in prefills}:
            # Two of each are enough to find the best pair of different workers.
            best_prefills = nsmallest(
                2,
                (w.target for w in prefills if w.layout == layout),
                key=prefill_cost.__getitem__,
            )
            best_decodes = nsmallest(
                2, (w.target for w in decodes if w.layout == layout), key=decode_cost.__getitem__
            )
            pairs += [
                (p, d) for p in best_prefills for d in best_decodes if p.worker_id != d.worker_id
            ]
        if pairs:
            prefill, decode = min(pairs, key=lambda pd: (prefill_cost[pd[0]], decode_cost[pd[1]]))
            return Plan(prefill=prefill, decode=decode)
        if wholes := [w for w in decodes if w.role == "both"]:
            return Plan(whole=min((w.target for w in wholes), key=decode_cost.__getitem__))
        return Unplaced(missing(demand.model, view))

    def _prefill_cost(self, demand: Demand, worker: WorkerView) -> tuple[bool, int, float]:
        avoided = worker.target.worker_id in demand.avoid
        return avoided, worker.load.queued_prompt_tokens, self._rng.random()

    def _decode_cost(self, demand: Demand, worker: WorkerView) -> tuple[bool, int, int, float]:
        avoided = worker.target.worker_id in demand.avoid
        load = worker.load
        return avoided, load.running_sequences, load.reserved_tokens, self._rng.random()


def missing(model: str, view: Sequence[WorkerView]) -> str:
    """What keeps `model` from being served, in words; empty if nothing does."""
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
