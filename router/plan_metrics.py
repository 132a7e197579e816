"""The plan as metrics: every router tells what the controller last wrote to the store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from cluster.errors import Unavailable
from cluster.store.plan_records import ModelPlan, PlanView
from cluster.store.plans import Plans

POLL_SECONDS = 5.0


class PlanMetrics:
    """A collector over the latest plan; nothing before there is one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._view: PlanView | None = None
        registry.register(self)

    async def follow(self, plans: Plans) -> None:
        """Reads the plan every `POLL_SECONDS` until cancelled."""
        while True:
            with suppress(Unavailable):  # then the last one stays, and its age tells
                self._view = await plans.view()
            await asyncio.sleep(POLL_SECONDS)

    def collect(self) -> Iterator[Metric]:
        view = self._view
        if view is None:
            return
        at = GaugeMetricFamily("pdserve_plan_timestamp_seconds", "When the plan was last written.")
        at.add_metric([], view.at)
        yield at
        yield from _workers(view.models)
        yield from _decisions(view.models)


def _workers(models: tuple[ModelPlan, ...]) -> Iterator[Metric]:
    workers = GaugeMetricFamily(
        "pdserve_plan_workers",
        "Workers: serving, wanted, needed (by the forecast), manual (set by hand).",
        labels=("model", "role", "count"),
    )
    for plan in models:
        needed = plan.decision.needed if plan.decision else {}
        counts = {"serving": plan.serving, "wanted": plan.wanted, "needed": needed}
        for role in ("prefill", "decode", "both"):
            for name, numbers in counts.items():
                workers.add_metric([plan.model, role, name], numbers.get(role, 0))
            if role in plan.manual:
                workers.add_metric([plan.model, role, "manual"], plan.manual[role])
    yield workers


def _decisions(models: tuple[ModelPlan, ...]) -> Iterator[Metric]:
    held = GaugeMetricFamily(
        "pdserve_plan_held", "1 while the planner changes nothing, for want of data.",
        labels=("model",),
    )  # fmt: skip
    short = GaugeMetricFamily(
        "pdserve_plan_shortfalls", "Targets that the budget cannot reach.", labels=("model",)
    )
    done = CounterMetricFamily(
        "pdserve_plan_actions", "Flips, workers added and removed.", labels=("model", "kind")
    )
    errors = GaugeMetricFamily(
        "pdserve_plan_prediction_error_ratio",
        "Mean relative error of the planner's model of a worker.",
        labels=("model", "step"),
    )
    attained = GaugeMetricFamily(
        "pdserve_plan_attainment_ratio",
        "Of the requests that ended within five minutes, those within all their targets.",
        labels=("model", "class"),
    )
    for plan in models:
        if plan.decision is not None:
            held.add_metric([plan.model], bool(plan.decision.held))
            short.add_metric([plan.model], len(plan.decision.shortfalls))
        for kind in ("flips", "added", "removed"):
            done.add_metric([plan.model, kind], plan.done.get(kind, 0))
        for step, error in plan.errors.items():
            errors.add_metric([plan.model, step], error)
        for name, share in plan.attainment.items():
            attained.add_metric([plan.model, name], share)
    yield from (held, short, done, errors, attained)
