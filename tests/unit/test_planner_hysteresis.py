"""What is kept, and for how long: of needs that came, and of fears that did not come true."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import mean

from cluster.planner.demand import Lengths
from cluster.planner.forecast import Holt
from cluster.planner.hardware import hardware
from cluster.planner.hysteresis import Hysteresis
from cluster.planner.outlook import Outlook
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.state import ClassTargets, Counts, Observed, Policy, Traffic

POLICY = Policy({"default": 16}, cold_start=30.0, interval=5.0, down_after=180.0)
CALM = Counts(both=2)


def kept_for(feared: Counts, come: Counts) -> float:
    """Seconds for which more than the calm's workers are kept after one such moment."""
    steady = Hysteresis(POLICY)
    steady.wish(0.0, CALM, CALM, CALM, {}, True, [])
    steady.wish(300.0, feared, come, feared, {}, True, [])
    now = 300.0
    while now < 1000.0:
        now += POLICY.interval
        if steady.wish(now, CALM, CALM, feared, {}, True, []).keep == CALM:
            return now - POLICY.interval - 300.0
    return now


def test_what_came_is_kept_for_the_whole_time() -> None:
    assert kept_for(Counts(both=9), Counts(both=9)) == POLICY.down_after


def test_a_fear_that_did_not_come_true_costs_no_more_than_one_worker_would() -> None:
    for excess in (1, 2, 3):
        assert kept_for(Counts(both=2 + excess), CALM) == POLICY.down_after / excess


def test_what_was_started_is_waited_for_before_it_is_judged() -> None:
    assert kept_for(Counts(both=16), CALM) == 1.5 * POLICY.cold_start


def test_a_burst_is_feared_to_go_on_and_kept_at_what_it_was() -> None:
    outlook = Outlook(Holt)
    lengths = (Lengths(1000, 20),)
    for at, rate in enumerate([4.0] * 20 + [60.0]):
        observed = Observed((), {"": Traffic(rate, lengths)}, float(at))
        outlook.learn(observed)
    worker = roofline(load_shape("llama-3.1-8b"), hardware("L40S"))
    feared = outlook.feared(POLICY, observed, worker, {"": ClassTargets(1.0, 0.05)})
    come = outlook.come(POLICY)
    assert 26.0 < come[""] < 60.0
    assert feared[""].rate > 1.3 * come[""]


def test_arrivals_that_merely_scatter_are_no_error_of_the_forecast() -> None:
    """Counts of a steady Poisson stream: their variance is the queues' affair."""
    rng, outlook, seconds = random.Random(3), Outlook(Holt), POLICY.interval
    told = []
    for at in range(400):
        count, left = 0, rng.expovariate(6.0)
        while left < seconds:
            count, left = count + 1, left + rng.expovariate(6.0)
        traffic = Traffic(count / seconds, (Lengths(1000, 20),))
        outlook.learn(Observed((), {"": traffic}, float(at)))
        told.append(outlook.come(POLICY)[""])
    scatter = math.sqrt(6.0 / seconds)
    assert 6.0 < mean(told) < 6.0 + 0.75 * POLICY.headroom * scatter  # else 1.05 and more


def test_pools_that_were_large_in_turn_lend_but_do_not_shrink() -> None:
    """Together their largest needs are over the budget; each moment's fitted it."""
    steady = Hysteresis(replace(POLICY, budget={"default": 4}))
    prompts, answers = Counts(prefill=3, decode=1), Counts(prefill=1, decode=3)
    steady.wish(0.0, prompts, prompts, prompts, {}, True, [])
    calm = Counts(prefill=1, decode=1)
    for step in range(1, 20):
        needed = answers if step == 3 else calm
        wish = steady.wish(step * POLICY.interval, needed, needed, prompts, {}, True, [])
        assert wish.keep.total == 4
    assert wish.lend == calm
