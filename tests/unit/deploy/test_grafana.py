"""The dashboards ask for metrics and labels that routers export, and fit on their grid."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from cluster.obs.metrics import RouterMetrics
from cluster.store.plan_records import DecisionRecord, ModelPlan, PlanView
from router.plan_metrics import PlanMetrics
from tests.unit.deploy.manifests import ROOT

DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
USE = re.compile(r"(pdserve_\w+)(?:\{([^}]*)\})?")
GROUPED = re.compile(r"by \(([\w, ]+)\) \(\s*(?:rate|increase)?\(?(pdserve_\w+)")


class OnePlan:
    async def view(self) -> PlanView:
        workers = {"prefill": 1, "decode": 1}
        decision = DecisionRecord(1, 1.0, "m", "planner", True, workers, workers, workers)
        plan = ModelPlan(
            "m", workers, workers, workers, (), {},
            attainment={"standard": 1.0}, errors={"decode": 0.1}, decision=decision,
        )  # fmt: skip
        return PlanView(1.0, "act", (plan,))


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Names of samples, as Prometheus stores them, and their labels."""
    registry = CollectorRegistry()
    RouterMetrics(registry)
    plans = PlanMetrics(registry)

    async def look() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(plans.follow(OnePlan()), 0.1)  # type: ignore[arg-type]

    asyncio.run(look())
    found: dict[str, set[str]] = {}
    for metric in registry.collect():
        labels = {name for sample in metric.samples for name in sample.labels}
        for name in names(metric):
            found[name] = labels | labels_of(registry, metric)
    return found


def names(metric: Metric) -> list[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    return [metric.name + suffix for suffix in suffixes.get(metric.type, ("",))]


def labels_of(registry: CollectorRegistry, metric: Metric) -> set[str]:
    """Those of a family that has no sample yet, and `le`."""
    collector = registry._names_to_collectors.get(metric.name)
    labels = set(getattr(collector, "_labelnames", ()))
    return labels | ({"le"} if metric.type == "histogram" else set())


def panels() -> list[Any]:
    return [
        pytest.param(panel, id=f"{path.stem}: {panel['title']}")
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
    ]


@pytest.mark.parametrize("panel", panels())
def test_panels_ask_for_what_is_exported(panel: Any, exported: dict[str, set[str]]) -> None:
    for target in panel["targets"]:
        used = USE.findall(target["expr"])
        assert used
        for name, selector in used:
            assert name in exported
            assert set(re.findall(r"(\w+)=", selector)) <= exported[name]
        for grouping, name in GROUPED.findall(target["expr"]):
            assert {label.strip() for label in grouping.split(",")} <= exported[name]
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert re.search(rf"by \([^)]*\b{label}\b", target["expr"])


def test_panels_lie_on_the_grid_and_do_not_overlap() -> None:
    assert DASHBOARDS
    for path in DASHBOARDS:
        taken: set[tuple[int, int]] = set()
        dashboard = json.loads(path.read_text())
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in dashboard["panels"]:
            at = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(at["x"], at["x"] + at["w"])
                for y in range(at["y"], at["y"] + at["h"])
            }
            assert max(x for x, _ in cells) < 24
            assert not cells & taken
            taken |= cells
