"""The virtual engine that starts a step before it looks at the one before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.planner.performance import (
    DecodeCost,
    HandoffCost,
    Launch,
    Performance,
    PrefillCost,
)
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.workload import Arrival
from cluster.simulator.world import World

DECODE = DecodeCost(0.005, 0.0)
WORKER = Performance(
    prefill=PrefillCost(0.0, 1e-5),
    decode=DECODE,
    decode_large=DECODE,
    large_batch=1000,
    handoff=HandoffCost(0.0, 1e15),
    kv_bytes_per_token=1.0,
    kv_capacity=1_000_000,
    launch=Launch(256, 0.02, 0.03),
)


def first_tokens(
    *prompts: tuple[float, int], max_tokens: int = 8192, worker: Performance = WORKER
) -> list[float]:
    """When each prompt's first token is told, ms; they come at those milliseconds."""
    split = Deployment(worker, 1, 1, limits=EngineLimits(max_tokens), placement_mode="always")
    outcomes = World(split).run([Arrival(at / 1e3, tokens, 1) for at, tokens in prompts])
    return [pytest.approx(1e3 * (o.at + o.ttft)) for o in outcomes]


def test_a_short_prompt_alone_takes_its_launch() -> None:
    assert first_tokens((0, 100)) == [20]
    assert first_tokens((0, 300)) == [30]


def test_a_token_waits_for_the_launch_of_what_came_meanwhile() -> None:
    # The second came while the first was launched; the third joins it, and is told with it.
    assert first_tokens((0, 100), (5, 100), (15, 100)) == [40, 40, 40]


def test_steps_of_what_keeps_coming_are_told_one_launch_late() -> None:
    assert first_tokens((0, 100), (5, 300), (25, 100), (55, 100)) == [50, 70, 90, 90]


def test_launches_behind_another_may_be_quicker() -> None:
    worker = replace(WORKER, launch=Launch(256, 0.02, 0.03, 0.015, 0.025))
    # The second is launched from 20 to 45, the third to 60; the fourth, followed by none,
    # takes what a prompt alone does.
    told = first_tokens((0, 100), (5, 300), (25, 100), (55, 100), worker=worker)
    assert told == [45, 60, 75, 80]


def test_what_comes_after_the_launch_waits_for_the_outcome() -> None:
    # 10,000 tokens are computed until 100; the second prompt is launched then.
    assert first_tokens((0, 10_000), (40, 100), max_tokens=10_000) == [100, 120]


def test_the_device_computes_one_step_after_the_other() -> None:
    assert first_tokens((0, 10_000), (10, 5000), max_tokens=10_000) == [100, 150]


def test_a_prompt_of_several_steps_has_two_of_them_under_way() -> None:
    assert first_tokens((0, 12_000), max_tokens=5000) == [120]
