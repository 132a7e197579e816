"""What the pools take from this router, from what the workers registered. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from cluster.config import Config, ModelConfig
from cluster.store.records import WorkerRecord
from router.admission.offers import Capacity, SloClass
from router.admission.policy import Limits, Policy, TenantPolicy
from router.placement import Mode

PREFILL_STEPS = 2
"""A prefill worker is given what fills so many of its steps: the one it computes and the next."""


def capacity(
    model: ModelConfig, workers: Iterable[WorkerRecord], routers: int, mode: Mode = "always"
) -> Capacity:
    """Of `model`, for one of so many routers. In a pool that is empty others stand in, if they may.

    Prefill is shared out between the routers. KV is not: an engine that is given more than it holds
    queues and preempts, while a part that is not used is lost.
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
    return Capacity(
        prefill_tokens=max(credit, len(prefills) * credit / max(1, routers)),
        prefill_worker_tokens=credit,
        kv_tokens=sum(w.num_blocks * w.block_size for w in decodes) if known else math.inf,
        sequences=len(decodes) * model.max_num_seqs,
    )


class Members(Protocol):
    """The registry as it was last read."""

    @property
    def records(self) -> tuple[WorkerRecord, ...]: ...
    @property
    def routers(self) -> int: ...


class Capacities:
    """Capacity by model, worked out once for each change of the registry."""

    def __init__(
        self, models: Sequence[ModelConfig], members: Members, mode: Mode = "always"
    ) -> None:
        self._mode = mode
        self._models = models
        self._members = members
        self._seen: tuple[tuple[WorkerRecord, ...], int] | None = None
        self._known: dict[str, Capacity] = {}

    def __call__(self) -> Mapping[str, Capacity]:
        records, routers = self._members.records, self._members.routers
        if self._seen is None or self._seen[0] is not records or self._seen[1] != routers:
            self._seen = (records, routers)
            self._known = {m.name: capacity(m, records, routers, self._mode) for m in self._models}
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
