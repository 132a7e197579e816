"""What `pdserve reload` takes over, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.config import Config
from cluster.config_changes import changes, flatten, is_live
from router.admission.core import Admission
from router.admission.offers import Offer, SloClass
from router.capacity import policy

MODELS: list[dict[str, Any]] = [{"name": "llama-3.1/8b", "path": "p"}]
TENANTS = [{"name": "a.b", "token_env": "TOKENS"}]


def config(**sections: object) -> Config:
    return Config.model_validate({"models": MODELS, "tenants": TENANTS, **sections})


def changed(**sections: object) -> dict[str, str]:
    """Path → why it is not live."""
    return {c.path: c.why_not for c in changes(flatten(config()), flatten(config(**sections)))}


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"models": [{**MODELS[0], "prefill": {"replicas": 3}}]},
         "models.llama-3.1/8b.prefill.replicas"),
        ({"router": {"pool": {"replicas": 2}}}, "router.pool.replicas"),
        ({"router": {"max_queued_requests": 7}}, "router.max_queued_requests"),
        ({"targets": {"ttft_seconds": 1}}, "targets.ttft_seconds"),
        ({"classes": {"batch_share": 0.5}}, "classes.batch_share"),
        ({"classes": {"batch": {"ttft_seconds": 9}}}, "classes.batch.ttft_seconds"),
        ({"tenants": [{**TENANTS[0], "weight": 2}]}, "tenants.a.b.weight"),
        ({"tenants": [{**TENANTS[0], "limits": {"tokens_per_second": 9}}]},
         "tenants.a.b.limits.tokens_per_second"),
        ({"tenants": [{**TENANTS[0], "classes": ["batch"]}]}, "tenants.a.b.classes"),
        ({"tenants": [{"name": "a.b", "token_env": "OTHER"}]}, "tenants.a.b.token_env"),
        ({"tenants": [*TENANTS, {"name": "c", "token_env": "C"}]}, "tenants.c.weight"),
        ({"tenants": []}, "tenants.a.b.weight"),
        ({"operator": {"token_env": "OPERATOR"}}, "operator.token_env"),
        ({"lifecycle": {"drain_timeout_seconds": 9}}, "lifecycle.drain_timeout_seconds"),
    ],
)  # fmt: skip
def test_live(sections: dict[str, object], path: str) -> None:
    assert path in changed(**sections)
    assert not any(changed(**sections).values())


@pytest.mark.parametrize(
    ("sections", "path", "why"),
    [
        ({"models": [{**MODELS[0], "dtype": "float32"}]}, "models.llama-3.1/8b.dtype", "engines"),
        ({"models": [*MODELS, {"name": "m", "path": "q"}]}, "models.m", "model that is new"),
        ({"models": [{**MODELS[0], "name": "m"}]}, f"models.{MODELS[0]['name']}", "that is gone"),
        ({"router": {"grpc_port": 1}}, "router.grpc_port", "at the start only"),
        ({"router": {"pool": {"num_cpus": 1}}}, "router.pool.num_cpus", "at the start only"),
        ({"store": {"lease_seconds": 3}}, "store.lease_seconds", "every process"),
        ({"secret": "x" * 16}, "secret", "every process"),
    ],
)  # fmt: skip
def test_not_live(sections: dict[str, object], path: str, why: str) -> None:
    assert why in changed(**sections)[path]


def test_nothing_changes_by_itself_and_not_on_its_way_through_a_file() -> None:
    flat = flatten(config())
    assert changes(flat, flatten(config())) == []
    assert changes(json.loads(json.dumps(flat)), flat) == []


def test_a_secret_is_seen_to_change_and_not_seen() -> None:
    flat = flatten(config(secret="hunter2-hunter2-hunter2", store={"url": "redis://:hunter3@h/0"}))
    assert "hunter" not in json.dumps(flat)
    other = flatten(config(secret="hunter4-hunter4-hunter4", store={"url": "redis://:hunter3@h/0"}))
    assert [change.path for change in changes(flat, other)] == ["secret"]


def test_a_path_with_a_longer_end_is_another_field() -> None:
    assert is_live("lifecycle.start_timeout_seconds")
    assert not is_live("router.pool.placement")
    assert not is_live("models.m.replicas")


def offer(key: str) -> Offer:
    return Offer(key, "default", SloClass.STANDARD, "m", 8, 8, 99.0, 99.0, 1, 0)


def test_admission_takes_another_limit_over_between_two_requests() -> None:
    def limited(running: int) -> Config:
        return Config.model_validate(
            {"models": [{"name": "m", "path": "p"}], "router": {"max_running_requests": running}}
        )

    admission = Admission(policy(limited(1)))
    for key in ("a", "b", "c"):
        admission.offer(0.0, offer(key))
    admission.pump(0.0, {})
    assert (admission.running, admission.queued) == (1, 2)
    admission.set_policy(0.0, policy(limited(2)))
    admission.pump(0.0, {})
    assert (admission.running, admission.queued) == (2, 1)


def test_the_planners_settings_and_budgets_reload_live() -> None:
    def with_planner(**planner: object) -> Config:
        return Config.model_validate({"models": [{"name": "m", "path": "/m"}], "planner": planner})

    old = with_planner()
    h100 = {"name": "h100", "gpus": 8, "labels": {"gpu": "H100"}}
    new = with_planner(mode="act", interval_seconds=2, budget=[h100], season_seconds=60)
    found = changes(flatten(old), flatten(new))
    assert {change.path for change in found} >= {
        "planner.mode", "planner.budget.h100.gpus", "planner.budget.h100.labels"}  # fmt: skip
    assert all(change.live for change in found)
    more = with_planner(mode="act", budget=[{**h100, "gpus": 16}])
    assert [c.path for c in changes(flatten(new), flatten(more)) if "gpus" in c.path] == [
        "planner.budget.h100.gpus"
    ]
    json.dumps(flatten(new))  # it is kept on disk


def test_an_impossible_planner_is_refused() -> None:
    twice = [{"name": "a", "gpus": 1}, {"name": "a", "gpus": 2}]
    for planner in ({"mode": "dream"}, {"budget": twice}, {"share": 1.0}, {"interval_seconds": 0}):
        with pytest.raises(ValueError, match="planner"):
            Config.model_validate({"models": [{"name": "m", "path": "/m"}], "planner": planner})
