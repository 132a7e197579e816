"""Sizing where workers share cores, and where engines plan ahead: as the simulator has it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.planner.capacity import Load
from cluster.planner.demand import Demand, Lengths
from cluster.planner.hardware import hardware
from cluster.planner.online import OnlinePerformance
from cluster.planner.performance import Contention, Launch, Performance, PrefillCost
from cluster.planner.planner import Planner
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.sharing import NOTHING, Beside, slowed
from cluster.planner.sizing import size_split, size_whole
from cluster.planner.state import ClassTargets, Counts, Observed, Policy, Traffic, WorkerSeen
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.goodput import Goal, holds
from cluster.simulator.outcome import Targets, attainment
from cluster.simulator.workload import Arrival, lognormal, poisson
from cluster.simulator.world import World

ALONE = replace(roofline(load_shape("llama-3.1-8b"), hardware("L40S")), dispatch=0.01)
SHARED = replace(ALONE, contention=Contention(1.3, 1.5, 1.3, 0.005))
LIMITS = EngineLimits(max_tokens=1024)
PROMPT, OUTPUT = lognormal(1155, 1020, 1, 8000), lognormal(211, 129, 1, 1000)
TARGETS = ClassTargets(1.0, 0.05)


def traffic(rate: float) -> list[Arrival]:
    return poisson(rate, 120.0, lambda r: (PROMPT(r), OUTPUT(r)), 4)


def load(rate: float, worker: Performance = SHARED) -> Load:
    lengths = tuple(Lengths(a.prompt, a.output) for a in traffic(4.0)[:96])
    return Load(worker, {"": Demand(rate, lengths)}, {"": TARGETS}, chunk=1024)


def holds_on(counts: Counts, rate: float) -> bool:
    split = Deployment(
        SHARED, counts.prefill, counts.decode, counts.both, LIMITS, placement_mode="always"
    )
    return holds(split, traffic(rate), Goal(Targets(TARGETS.ttft, TARGETS.tpot)))


def test_what_is_called_enough_on_shared_cores_is_and_what_is_not_is_not() -> None:
    enough, too_much = size_split(load(4.0), 4), size_split(load(6.0), 4)
    assert enough and too_much
    assert enough.enough
    assert holds_on(enough.counts, 4.0)
    assert not too_much.enough
    assert not holds_on(Counts(1, 1), 6.0)
    unaware = size_split(load(6.0, ALONE), 4)
    assert unaware
    assert unaware.counts == Counts(1, 1)
    assert unaware.enough


def test_a_worker_more_on_the_same_cores_can_be_one_too_many() -> None:
    demand = load(4.0)
    assert demand.split(1, 1)[""].both > 0.9 > demand.split(1, 2)[""].both
    assert not holds_on(Counts(1, 2), 4.0)
    sizing = size_split(demand, 8)
    assert sizing
    assert sizing.counts == Counts(1, 1)


def test_aggregated_workers_slow_each_other_too() -> None:
    assert size_whole(load(6.0, ALONE), 8).enough
    assert not size_whole(load(6.0), 8).enough
    assert not holds_on(Counts(both=2), 6.0)


def test_an_overload_saturates() -> None:
    """No more than every other worker is under way."""
    beside = load(1000.0).beside(Counts(2, 3))
    assert beside.prefill == pytest.approx(1 + 3)
    assert beside.decode == pytest.approx(2 + 2)


def test_workers_with_cores_of_their_own_have_nothing_beside_them() -> None:
    assert load(8.0, ALONE).beside(Counts(2, 2)) == NOTHING


def test_the_way_to_the_engine_counts_into_the_first_token() -> None:
    """One prompt at a time, due just when it is computed: in time only without its way there."""
    seconds = ALONE.prefill_seconds(1000)
    demand = Load(
        ALONE,
        {"": Demand(0.001, (Lengths(1000, 2),))},
        {"": ClassTargets(seconds + ALONE.dispatch / 2, 1.0)},
    )
    assert demand.split(1, 1)[""].ttft == 0.0
    near = replace(demand, performance=replace(ALONE, dispatch=0.0))
    assert near.split(1, 1)[""].ttft > 0.99


@pytest.mark.parametrize("rate", [2.0, 5.0, 10.0])
@pytest.mark.parametrize("target", [0.035, 0.05, 0.065])
def test_tokens_that_are_told_a_launch_late_are_counted(rate: float, target: float) -> None:
    """Prompts whose step is its launch, 30 ms: one that another follows meanwhile takes two."""
    worker = replace(
        ALONE, dispatch=0.0, prefill=PrefillCost(0.002, 1e-5), launch=Launch(0, 0.03, 0.03)
    )
    split = Deployment(worker, 1, 1, placement_mode="always")
    outcomes = World(split).run(poisson(rate, 60.0, lambda _: (200, 2), 3))
    targets = ClassTargets(target, 1.0)
    demand = Load(worker, {"": Demand(rate, (Lengths(200, 2),))}, {"": targets})
    predicted = demand.split(1, 1)[""].ttft
    assert predicted == pytest.approx(attainment(outcomes, Targets(target, 1.0)), abs=0.06)


def test_steps_that_were_measured_beside_others_are_not_slowed_twice() -> None:
    beside = Beside(1.0, 0.5, 3.0)
    at_work = slowed(SHARED, beside)
    online = OnlinePerformance(SHARED)
    online.shares(beside)
    for _ in range(50):
        online.prefill_measured(512, 0, at_work.prefill_seconds(512))
        online.decode_measured(8, 4000, at_work.decode_seconds(8, 4000))
    assert online.current.prefill_seconds(512) == pytest.approx(SHARED.prefill_seconds(512))
    assert online.current.decode_seconds(8, 4000) == pytest.approx(SHARED.decode_seconds(8, 4000))
    assert online.current.contention == SHARED.contention


def test_the_planner_says_what_its_workers_have_beside_them() -> None:
    planner = Planner(Policy({"default": 4}), SHARED, {"": TARGETS}, chunk=1024)
    assert planner.beside == NOTHING
    workers = tuple(WorkerSeen(f"{r}-0", r, "ready") for r in ("prefill", "decode"))
    seen = {"": Traffic(3.0, tuple(load(3.0).demands[""].lengths))}
    planner.step(0.0, Observed(workers, seen, 0.0))
    assert planner.beside.prefill == pytest.approx(1.0, abs=0.05)  # decode hardly ever rests
    assert 0.1 < planner.beside.decode < 0.9
    assert math.isclose(planner.beside.handoffs, 3.0, rel_tol=0.05)
