"""Placement at work: feeds the core what a request is, learns from how it went, remembers why."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain

from cluster.clock import Clock
from cluster.config import TargetsConfig
from cluster.errors import PdserveError
from cluster.obs.metrics import RouterMetrics
from router.demand import DecodeStep, PrefillStep
from router.events import Place
from router.fleet import Fleet
from router.generation import Generation
from router.learn import Observed, learn, shares_of, steps_of
from router.output import Completed, CompletionReport, Stage
from router.placement import Decision, Demand, Placement, Unplaced
from router.share import Share

EXPLAINED_REQUESTS = 4096
"""Ended requests whose decisions are kept."""


@dataclass(frozen=True)
class Explained:
    """One decision and, once its completion has ended, what came of it.

    Attributes:
        decided_at: seconds since 1970.
        ttft_seconds: from the decision; None until the end, or if a retry came after it.
    """

    index: int
    attempt: int
    decided_at: float
    prompt_tokens: int
    decision: Decision
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None


@dataclass
class _Placed:
    """A request's decisions; the last of an index is the one that counts."""

    tenant: str
    request_id: str
    explained: list[Explained] = field(default_factory=list)
    shares: dict[int, dict[Stage, Share]] = field(default_factory=dict)


class Placer:
    """What dispatch asks for workers.

    Args:
        targets: of requests whose own are looser.
        measured: hears what the workers' steps took.
    """

    def __init__(
        self,
        fleet: Fleet,
        placement: Placement,
        targets: TargetsConfig,
        metrics: RouterMetrics,
        clock: Clock,
        measured: Callable[[PrefillStep | DecodeStep], None] = lambda _: None,
    ) -> None:
        self._measured = measured
        self._fleet = fleet
        self._placement = placement
        self._targets = targets
        self._metrics = metrics
        self._clock = clock
        self._requests: dict[str, _Placed] = {}
        self._ended: OrderedDict[str, _Placed] = OrderedDict()

    def set_targets(self, targets: TargetsConfig) -> None:
        """Other ones, for what is placed from now on."""
        self._targets = targets

    def place(self, key: str, generation: Generation, place: Place) -> Decision | Unplaced:
        """Decides for one completion of a request, which is known by `key` until its end."""
        now = self._clock.now()
        prompt = len(generation.prompt_token_ids)
        demand = Demand(
            generation.model,
            prompt,
            generation.max_tokens,
            decodes=generation.max_tokens > 1,
            # Not more than the cluster's: what a patient request takes, others wait for.
            ttft_seconds=min(generation.slo.ttft_seconds, self._targets.ttft_seconds),
            tpot_seconds=min(generation.slo.tpot_seconds, self._targets.tpot_seconds),
            waited_seconds=now - generation.received_at,
            held=self._fleet.held_tokens(
                generation.prompt_token_ids, generation.model, generation.cache_salt
            ),
            avoid=place.avoid,
        )
        self._fleet.tick(now)
        decision = self._placement.place(now, demand)
        if isinstance(decision, Decision):
            new = _Placed(generation.tenant, generation.request_id)
            placed = self._requests.setdefault(key, new)
            output = self._fleet.expected_output(generation.model, generation.max_tokens)
            placed.shares[place.index] = shares_of(
                decision.chosen, prompt, output, demand.tpot_seconds
            )
            wall = self._clock.wall()
            explained = Explained(place.index, place.attempt, wall, prompt, decision)
            placed.explained.append(explained)
            plan = decision.plan
            kind = "whole" if plan.whole else "split" if plan.decode else "prefill"
            self._metrics.placements.labels(generation.model, kind).inc()
        return decision

    def cached(self, generation: Generation) -> int:
        """Prompt tokens that the worker has in its prefix cache that has most of them."""
        held = self._fleet.held_tokens(
            generation.prompt_token_ids, generation.model, generation.cache_salt
        )
        return max(held.values(), default=0)

    def uncached(self, key: str) -> int | None:
        """Prompt tokens that were to compute where a request was placed first; None: nowhere."""
        placed = self._requests.get(key)
        return placed.explained[0].decision.chosen.uncached_tokens if placed else None

    def share(self, key: str, index: int, stage: Stage) -> Share:
        """What that part of the last decision puts on its worker."""
        return self._requests[key].shares[index][stage]

    def ended(self, key: str, generation: Generation, end: Completed | PdserveError) -> None:
        """Learns from a request, and forgets all but why it was placed so."""
        placed = self._requests.pop(key, None)
        if placed is None:
            return
        explained = placed.explained
        if isinstance(end, Completed):
            last = {e.index: e for e in explained}
            for report in end.completions:
                if (decided := last.get(report.index)) is not None:
                    shares = placed.shares[report.index]
                    after = self._learn(generation, decided, shares, report)
                    explained[explained.index(decided)] = after
        placed.shares.clear()
        self._ended[key] = placed
        self._ended.move_to_end(key)
        if len(self._ended) > EXPLAINED_REQUESTS:
            self._ended.popitem(last=False)

    def explain(self, request_id: str, tenant: str = "") -> dict[str, tuple[Explained, ...]]:
        """Why requests of that id that run or ended of late were placed so, by tenant.

        Args:
            tenant: whose is asked for; empty: everyone's.
        """
        return {
            placed.tenant: tuple(placed.explained)
            for placed in chain(self._ended.values(), self._requests.values())  # The latest counts.
            if placed.request_id == request_id and tenant in ("", placed.tenant)
        }

    def _learn(
        self,
        generation: Generation,
        explained: Explained,
        shares: dict[Stage, Share],
        report: CompletionReport,
    ) -> Explained:
        chosen = explained.decision.chosen
        seen = Observed.of(report, len(generation.prompt_token_ids))
        now = self._clock.now()
        learn(self._fleet, now, generation.model, chosen, shares, seen)
        for step in steps_of(self._fleet, now, generation.model, shares, seen):
            self._measured(step)
        ttft = report.ttft_seconds - report.phases.queue
        errors = self._metrics.prediction_error
        errors.labels("ttft").observe(abs(ttft - chosen.ttft_seconds))
        if report.tokens > 1:
            errors.labels("tpot").observe(abs(report.tpot_seconds - chosen.tpot_seconds))
        return replace(explained, ttft_seconds=ttft, tpot_seconds=report.tpot_seconds)
