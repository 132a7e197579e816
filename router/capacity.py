"""What the pools take from this router, from what the workers registered. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.config import Config, ModelConfig
from cluster.store.records import WorkerRecord
from router.admission.offers import Capacity, SloClass
from router.admission.policy import Limits, Policy, TenantPolicy
from router.fleet import Fleet
from router.placement import Mode

PREFILL_STEPS = 2
"""A prefill worker is given what fills so many of its steps: the one it computes and the next."""


PACE_HEADROOM = 0.9
"""Of a bound per token: so much a decode step may take, beside what prompts take of the time."""

LEAST_PACED = 8
"""Sequences that a worker is always trusted to decode at once, whatever was seen of it."""


def capacity(
    model: ModelConfig,
    workers: Iterable[WorkerRecord],
    routers: int,
    mode: Mode = "always",
    paces: Paces | None = None,
) -> Capacity:
    """Of `model`, for one of so many routers. In a pool that is empty others stand in, if they may.

    Prefill is shared out between the routers. KV is not: an engine that is given more than it holds
    queues and preempts, while a part that is not used is lost.

    Args:
        paces: None: whatever the pace.
    """
    ready = [w for w in workers if w.model == model.name and w.state == "ready"]
    prefills = [w for w in ready if w.role in ("prefill", "both")]
    decodes = [w for w in ready if w.role in ("decode", "both")]
    if mode != "always":
        prefills, decodes = prefills or ready, decodes or ready
    if not prefills or not decodes:
        return Capacity()  # They wait for a worker, and are told which one is missing.
    credit = PREFILL_STEPS * model.max_num_batched_tokens
    known = all(w.num_blocks and w.block_size for w in decodes)
    pools = Capacity(
        prefill_tokens=max(credit, len(prefills) * credit / max(1, routers)),
        prefill_worker_tokens=credit,
        kv_tokens=sum(w.num_blocks * w.block_size for w in decodes) if known else math.inf,
        sequences=len(decodes) * model.max_num_seqs,
        decode_workers=len(decodes),
    )
    return pools if paces is None else paces.of(pools, model.name)


class Paces:
    """How many sequences of a model its workers decode at once within a bound per token, as far as
    the fleet has learned it.

    With several routers each knows of its own sequences only, and learns what a step takes beside
    those of the others: what it finds is its own part.
    """

    def __init__(self, fleet: Fleet, mode: Mode) -> None:
        self._fleet = fleet
        self._mode = mode
        self._version = (-1, -1)
        self._known: dict[tuple[str, float], float] = {}
        self._slots_version = -1
        self._slots: dict[tuple[str, str], NDArray[np.intp]] = {}

    def of(self, pools: Capacity, model: str) -> Capacity:
        """`pools` of a model, with what is known and expected of their pace."""

        return replace(
            pools,
            paced=partial(self.within, model),
            prefill_seconds=partial(self.prefill_seconds, model),
            step_seconds=partial(self.step_seconds, model),
        )

    def prefill_seconds(self, model: str, tokens: float) -> float:
        """Of a prompt of which so much is to compute, alone on a worker; 0: there is none."""
        rows = self._rows(model, "prefill")
        return float(self._fleet.speeds.prefill.at(tokens, rows).mean()) if rows.size else 0.0

    def step_seconds(self, model: str, sequences: float) -> float:
        """Of a token, where so many decode at once, in equal parts; 0: there is no worker."""
        rows = self._rows(model, "decode")
        if not rows.size:
            return 0.0
        return float(self._fleet.speeds.step.at(sequences / rows.size, rows).mean())

    def within(self, model: str, tpot_seconds: float) -> float:
        """Infinite if a single sequence takes longer on every worker, or there is none."""
        version = (self._fleet.version, self._fleet.speeds.step.version)
        if version != self._version:
            self._version = version
            self._known.clear()
        known = self._known.get((model, tpot_seconds))
        if known is None:
            known = self._known[model, tpot_seconds] = self._within(model, tpot_seconds)
        return known

    def _rows(self, model: str, role: str) -> NDArray[np.intp]:
        """Slots that do that for `model`: all of its, if they may, where none has the role."""
        if self._slots_version != self._fleet.version:
            self._slots_version = self._fleet.version
            self._slots.clear()
        known = self._slots.get((model, role))
        if known is None:
            views = [(i, v) for i, v in enumerate(self._fleet.views) if v is not None]
            ready = [(slot, view) for slot, view in views if view.model == model and view.ready]
            rows = [slot for slot, view in ready if view.role in (role, "both")]
            if not rows and self._mode != "always":
                rows = [slot for slot, _ in ready]
            known = self._slots[model, role] = np.array(rows, dtype=np.intp)
        return known

    def _within(self, model: str, tpot_seconds: float) -> float:
        rows = self._rows(model, "decode")
        if not rows.size or math.isinf(tpot_seconds):
            return math.inf
        sizes = self._fleet.speeds.step.within(PACE_HEADROOM * tpot_seconds, rows)
        if not sizes.any():
            return math.inf
        return float(np.maximum(np.floor(sizes), LEAST_PACED).sum())


class Members(Protocol):
    """The registry as it was last read."""

    @property
    def records(self) -> tuple[WorkerRecord, ...]: ...
    @property
    def routers(self) -> int: ...


class Capacities:
    """Capacity by model, worked out once for each change of the registry.

    Args:
        paces: None: whatever the pace.
    """

    def __init__(
        self,
        models: Sequence[ModelConfig],
        members: Members,
        mode: Mode = "always",
        paces: Paces | None = None,
    ) -> None:
        self._paces = paces
        self._mode = mode
        self._models = models
        self._members = members
        self._seen: tuple[tuple[WorkerRecord, ...], int] | None = None
        self._known: dict[str, Capacity] = {}

    def __call__(self) -> Mapping[str, Capacity]:
        records, routers = self._members.records, self._members.routers
        if self._seen is None or self._seen[0] is not records or self._seen[1] != routers:
            self._seen = (records, routers)
            self._known = {
                model.name: capacity(model, records, routers, self._mode, self._paces)
                for model in self._models
            }
        return self._known


def policy(config: Config) -> Policy:
    """Admission's settings."""
    classes = config.classes
    patience = {c: getattr(classes, c).patience_seconds or math.inf for c in SloClass}
    return Policy(
        config.router.max_running_requests,
        config.router.max_queued_requests,
        patience,
        classes.batch_share,
        {
            tenant.name: TenantPolicy(
                tenant.weight,
                Limits(
                    tenant.limits.requests_per_second or math.inf,
                    tenant.limits.tokens_per_second or math.inf,
                    tenant.limits.burst_seconds,
                    tenant.limits.max_running_requests or math.inf,
                    tenant.limits.max_queued_requests or math.inf,
                ),
            )
            for tenant in config.tenants
        },
    )
