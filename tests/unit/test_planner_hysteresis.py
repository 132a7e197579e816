"""What is kept, and for how long: of needs that came, and of fears that did not come true."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import mean

import pytest

from cluster.planner.demand import Lengths
from cluster.planner.forecast import Holt
from cluster.planner.hardware import hardware
from cluster.planner.hysteresis import Hysteresis
from cluster.planner.outlook import PARTS, Outlook, fallen, rate_serving
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.state import ClassTargets, Counts, Observed, Policy, Traffic

POLICY = Policy({"default": 16}, cold_start=30.0, interval=5.0, down_after=180.0)
TARGETS = {"": ClassTargets(1.0, 0.05)}
CALM = Counts(both=2)


def kept_for(feared: Counts, come: Counts) -> float:
    """Seconds for which more than the calm's workers are kept after one such moment; what came is
    told for `down_after`."""
    steady = Hysteresis(POLICY)
    steady.wish(0.0, CALM, CALM, CALM, {}, True, [])
    steady.wish(300.0, feared, come, feared, {}, True, [])
    now = 300.0
    while now < 1000.0:
        now += POLICY.interval
        told = come if now <= 300.0 + POLICY.down_after else CALM
        if steady.wish(now, CALM, told, feared, {}, True, []).keep == CALM:
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
    feared = outlook.feared(POLICY, observed, worker, TARGETS, POLICY.down_after)
    come = outlook.come(TARGETS, POLICY.down_after)
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
        told.append(outlook.come(TARGETS, POLICY.down_after)[""])
    scatter = math.sqrt(6.0 / seconds)
    assert 6.0 < mean(told) < 6.0 + 0.75 * POLICY.headroom * scatter  # else 1.05 and more


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 1.0])
def test_the_rate_that_serves_a_share_is_the_least_that_does(share: float) -> None:
    rng = random.Random(5)
    for rates in ([4.0], [0.0, 0.0], [3.0] * 20, [rng.expovariate(0.1) for _ in range(50)]):
        serving = rate_serving(rates, share)
        served = [sum(min(rate, at) for rate in rates) for at in (serving, 0.99 * serving)]
        assert math.isclose(served[0], share * sum(rates))
        assert served[1] < served[0] or not sum(rates)


def come_after(rates: list[float]) -> float:
    """What is said to have come after these, one every interval."""
    outlook = Outlook(Holt)
    for step, rate in enumerate(rates):
        traffic = {"": Traffic(rate, (Lengths(1000, 20),))}
        outlook.learn(Observed((), traffic, step * POLICY.interval))
    return outlook.come(TARGETS, POLICY.down_after)[""]


def test_a_clump_is_missed_where_the_requests_around_it_make_up_for_it() -> None:
    """It is a tenth of three minutes' requests, and a fortieth of what is remembered."""
    calm = [10.0] * 160
    assert come_after([*calm, 45.0, *calm[:20]]) < 12.0
    assert come_after([*calm[:15], 45.0, *calm[:20]]) > 20.0


def test_what_came_is_what_comes_once_the_load_has_been_less_for_long() -> None:
    steps = round(POLICY.down_after / POLICY.interval)
    assert come_after([10.0] * 100 + [1.0] * (steps - 5)) > 5.0
    assert come_after([10.0] * 100 + [1.0] * steps) <= 1.0


def test_a_need_that_the_fall_has_ended_is_kept_no_longer_than_a_fear() -> None:
    """It had come when it was needed; that the load falls since makes it so many too many."""
    steady, excess = Hysteresis(POLICY), 3
    needed = Counts(both=CALM.total + excess)
    steady.wish(0.0, CALM, CALM, CALM, {}, True, [])
    steady.wish(300.0, needed, needed, needed, {}, True, [])
    kept = {
        after: steady.wish(300.0 + after, CALM, CALM, needed, {}, True, []).keep
        for after in (POLICY.down_after / excess, POLICY.down_after / excess + POLICY.interval)
    }
    assert list(kept.values()) == [needed, CALM]


def test_a_fall_that_goes_on_is_followed() -> None:
    """From forty to ten over ten minutes: what came two minutes ago does not come again."""
    rng, fall = random.Random(7), [40.0 - 0.25 * step for step in range(120)]
    plain = come_after(fall)
    assert 0.94 * fall[-1] < plain < 1.05 * fall[-1]
    noisy = [max(0.0, rng.gauss(rate, 1.5)) for rate in fall]
    assert 0.9 * fall[-1] < come_after(noisy) < 1.5 * fall[-1]
    assert fallen(list(enumerate(fall[::-1]))) == fall[::-1]  # a rise is no fall


@pytest.mark.parametrize("high", range(1, 36))
def test_one_step_down_is_no_fall(high: int) -> None:
    rates = [(POLICY.interval * step, 9.0 if step < high else 2.0) for step in range(36)]
    assert fallen(rates) == [rate for _, rate in rates]


def test_what_swings_is_no_fall() -> None:
    """Half of the time nothing, in turns of a minute: what came before comes again."""
    minute = round(60 / POLICY.interval)
    turns = ([20.0] * minute + [2.0] * minute) * 6
    assert come_after(turns) > 17.0


def test_of_few_rates_no_fall_is_told() -> None:
    falling = [(5.0 * step, 30.0 - step) for step in range(PARTS)]
    assert fallen(falling[:-1]) == [rate for _, rate in falling[:-1]]
    assert fallen(falling) == pytest.approx([falling[-1][1]] * PARTS)
    assert fallen([(0.0, 5.0)] * PARTS) == [5.0] * PARTS  # a clock that stands


def test_workers_of_another_mode_are_kept_no_longer_than_a_fear() -> None:
    """The change of mode does not make sixteen workers of a burst needed for once more so long."""
    steady = Hysteresis(POLICY)
    split, whole = Counts(prefill=2, decode=1), Counts(both=16)
    steady.wish(0.0, CALM, CALM, CALM, {}, True, [])
    steady.wish(300.0, whole, CALM, whole, {}, True, [])
    steady.turn()
    kept = []
    for step in range(40):
        now = 320.0 + step * POLICY.interval
        have = whole if step == 0 else Counts(prefill=13, decode=3)
        kept.append(steady.wish(now, split, split, have, {}, True, []).keep)
    assert kept[1].total == 16
    assert kept[round(1.5 * POLICY.cold_start / POLICY.interval) + 1] == split


def test_a_pool_that_a_person_holds_goes_before_what_the_other_one_needs() -> None:
    steady, needed = Hysteresis(replace(POLICY, budget={"default": 4})), Counts(1, 3)
    wish = steady.wish(0.0, needed, needed, needed, {"prefill": 2}, True, [])
    assert wish.want == Counts(prefill=2, decode=2)
    assert wish.keep.decode == 2


@pytest.mark.parametrize("budget", [4, 16])
def test_pools_that_were_large_in_turn_lend_but_do_not_shrink(budget: int) -> None:
    """No moment needed more than four, whatever the budget has room for."""
    steady = Hysteresis(replace(POLICY, budget={"default": budget}))
    prompts, answers = Counts(prefill=3, decode=1), Counts(prefill=1, decode=3)
    steady.wish(0.0, prompts, prompts, prompts, {}, True, [])
    calm = Counts(prefill=1, decode=1)
    for step in range(1, 20):
        needed = answers if step == 3 else calm
        wish = steady.wish(step * POLICY.interval, needed, needed, prompts, {}, True, [])
        assert wish.keep.total == 4
    assert wish.lend == calm
