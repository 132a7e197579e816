"""Sizing: what the formulas say is enough, is enough in the simulator; not wasteful."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.planner.capacity import Load
from cluster.planner.demand import Demand, Lengths
from cluster.planner.hardware import hardware
from cluster.planner.performance import DecodeCost, HandoffCost, across
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.sizing import shortfalls, size_split, size_whole
from cluster.planner.state import ClassTargets, Counts
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.goodput import Goal, holds
from cluster.simulator.outcome import Targets
from cluster.simulator.workload import Arrival, lognormal, poisson

WORKER = roofline(load_shape("llama-3.1-8b"), hardware("L40S"))
PROMPT, OUTPUT = lognormal(1155, 1020, 1, 8000), lognormal(211, 129, 1, 1000)
TARGETS = ClassTargets(1.0, 0.045)


def traffic(rate: float) -> list[Arrival]:
    return poisson(rate, 120.0, lambda r: (PROMPT(r), OUTPUT(r)), 4)


def load(rate: float, targets: ClassTargets = TARGETS) -> Load:
    lengths = tuple(Lengths(a.prompt, a.output) for a in traffic(4.0)[:96])
    return Load(WORKER, {"": Demand(rate, lengths)}, {"": targets}, chunk=1024)


@pytest.mark.parametrize("rate", [3.0, 8.0])
def test_a_split_that_is_called_enough_is_enough(rate: float) -> None:
    sizing = size_split(load(rate), 20)
    assert sizing is not None
    assert sizing.enough
    deployment = Deployment(
        WORKER, sizing.counts.prefill, sizing.counts.decode, limits=EngineLimits(max_tokens=1024)
    )
    assert holds(deployment, traffic(rate), Goal(Targets(1.0, 0.045)))


def test_it_is_not_wasteful() -> None:
    """The work alone would take this many; queues and tails may add a few, not double it."""
    demand = load(8.0)
    sizing = size_split(demand, 20)
    assert sizing is not None
    assert math.ceil(demand.prefill_work) <= sizing.counts.prefill <= demand.prefill_work + 2


def test_more_load_never_needs_less() -> None:
    totals = [size_split(load(rate), 200).counts for rate in (1, 4, 16, 64)]  # type: ignore[union-attr]
    assert [c.prefill for c in totals] == sorted(c.prefill for c in totals)
    assert [c.decode for c in totals] == sorted(c.decode for c in totals)
    whole = [size_whole(load(rate), 400).counts.both for rate in (1, 4, 16)]
    assert whole == sorted(whole)


def test_bursts_and_tails_cost_more_than_averages() -> None:
    calm = load(8.0)
    bursty = Load(
        WORKER, {"": Demand(8.0, calm.demands[""].lengths, burstiness=8.0)}, calm.targets, 1024
    )
    assert size_split(bursty, 40).counts.prefill > size_split(calm, 40).counts.prefill  # type: ignore[union-attr]


def test_an_answer_of_two_tokens_takes_its_handoff_and_one_step() -> None:
    decode = DecodeCost(0.01, 0.0, 1e-4)
    worker = replace(WORKER, decode=decode, handoff=HandoffCost(0.02, 1e15))
    two = {"": Demand(0.001, (Lengths(1000, 2),))}
    for tpot, met in ((0.0302, 1.0), (0.03, 0.0)):  # one step of one sequence takes 0.0101 s
        targets = {"": ClassTargets(1.0, tpot)}
        assert Load(worker, two, targets).split(1, 1)[""].tpot == pytest.approx(met, abs=1e-3)


def test_loose_tpot_wants_no_split_and_tight_tpot_does() -> None:
    loose, tight = ClassTargets(2.0, 0.2), ClassTargets(2.0, 0.03)
    assert (
        size_whole(load(4.0, loose), 20).counts.total
        <= size_split(load(4.0, loose), 20).counts.total
    )  # type: ignore[union-attr]
    split = size_split(load(8.0, tight), 20)
    assert split is not None
    assert not size_whole(load(8.0, tight), 20).enough or (
        split.counts.total < size_whole(load(8.0, tight), 20).counts.total
    )


def test_pools_on_different_gpus_are_sized_each_with_its_own() -> None:
    fast = roofline(load_shape("llama-3.1-8b"), hardware("H200"))
    slow_decodes, slow_prompts, slow, quick = (
        size_split(replace(load(16.0), performance=across(p, d)), 100)
        for p, d in ((fast, WORKER), (WORKER, fast), (WORKER, WORKER), (fast, fast))
    )
    assert slow_decodes and slow_prompts and slow and quick
    assert slow_decodes.counts == Counts(prefill=quick.counts.prefill, decode=slow.counts.decode)
    assert slow_prompts.counts == Counts(prefill=slow.counts.prefill, decode=quick.counts.decode)
    whole = size_whole(replace(load(16.0), performance=across(fast, WORKER)), 100)
    assert whole.counts == size_whole(load(16.0), 100).counts


def test_nothing_to_do_takes_the_minimum() -> None:
    idle = Load(WORKER, {}, {"": TARGETS})
    assert size_split(idle, 9, minimum=2).counts == Counts(2, 2)  # type: ignore[union-attr]
    assert size_whole(idle, 9).counts == Counts(both=1)
    assert size_split(idle, 1) is None


def test_out_of_reach_is_said_with_how_much() -> None:
    slow = load(4.0, ClassTargets(1.0, 0.02))  # one step takes longer than that
    sizing = size_split(slow, 16)
    assert sizing is not None
    (missed,) = shortfalls(slow, sizing)
    assert missed.metric == "tpot"
    assert 0.001 < missed.excess < 0.05
    assert sizing.counts.total == 16


def with_endless(share: float, rate: float = 2.0, goal: float = 0.9) -> Load:
    """A share of the prompts is so long that no worker computes them within 1 s."""
    long = round(100 * share)
    lengths = (Lengths(20_000, 100),) * long + (Lengths(1000, 100),) * (100 - long)
    targets = ClassTargets(1.0, 0.1, goal)
    return Load(WORKER, {"": Demand(rate, lengths)}, {"": targets}, chunk=1024)


@pytest.mark.parametrize("share", [0.04, 0.08, 0.12, 0.3, 0.9])
def test_prompts_that_no_worker_computes_in_time_do_not_take_the_budget(share: float) -> None:
    """Workers for the others are enough; and the share is met where that is possible at all."""
    demand = with_endless(share)
    for sizing in (size_split(demand, 200), size_whole(demand, 200)):
        assert sizing is not None
        assert sizing.counts.total <= 3 * demand.prefill_work + 4
        met = sizing.predicted[""]
        assert met.both >= (0.9 if share < 0.06 else 0.9 * (1 - share))
        assert sizing.enough == (met.both >= 0.9)


def test_where_every_prompt_is_too_long_the_budget_is_used() -> None:
    assert size_whole(with_endless(1.0), 12).counts.total == 12
    split = size_split(with_endless(1.0), 12)
    assert split is not None
    assert split.counts.total == 12


def test_more_than_the_budget_can_serve_takes_all_of_it_whatever_is_too_long() -> None:
    split = size_split(with_endless(0.12, rate=60.0), 8)
    assert split is not None
    assert split.counts.total == 8
    assert not split.enough
    assert size_whole(with_endless(0.12, rate=60.0), 8).counts.total == 8


def test_a_high_share_is_not_given_up_for_a_few() -> None:
    """One in a thousand is too long; ninety-nine in a hundred are still to be met."""
    lengths = (Lengths(20_000, 100),) + (Lengths(1000, 100),) * 999
    targets = {"": ClassTargets(1.0, 0.1, 0.99)}
    demand = Load(WORKER, {"": Demand(2.0, lengths)}, targets, chunk=1024)
    split = size_split(demand, 200)
    assert split is not None
    assert split.enough
    assert size_whole(demand, 200).enough
