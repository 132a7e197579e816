"""Forecasts: levels, trends, seasons, and values that are none."""

from __future__ import annotations

import math
import random

import pytest

from cluster.planner.demand import Demand, Lengths, RecentLengths
from cluster.planner.forecast import Forecast, Holt, Seasonal


@pytest.mark.parametrize("forecast", [Holt(), Seasonal(8)])
def test_a_constant_rate_is_forecast_as_it_is(forecast: Forecast) -> None:
    for _ in range(40):
        forecast.observe(5.0)
    assert forecast.ahead(10) == pytest.approx(5.0)
    assert forecast.spread == pytest.approx(0.0, abs=1e-6)


def test_a_ramp_is_seen_coming() -> None:
    holt = Holt()
    for i in range(40):
        holt.observe(1.0 + i)
    assert 40 < holt.ahead(3) < 46
    assert holt.highest(3) == holt.ahead(3)


def test_a_burst_is_not_drawn_on_for_ever() -> None:
    holt = Holt()
    for rate in (*[10.0] * 30, 40.0):
        holt.observe(rate)
    assert holt.ahead(1000) < 80


def test_what_the_next_value_takes_back_is_noise_and_a_step_is_none() -> None:
    rng = random.Random(2)
    clumps, steps = Holt(), Holt()
    for i in range(240):
        clumps.observe(rng.choice([0.0, 20.0]))
        steps.observe(5.0 if i < 200 else 20.0)
    assert clumps.noise == pytest.approx(10.0, rel=0.2)
    assert steps.noise == 0.0


def test_it_never_goes_below_zero() -> None:
    holt = Holt()
    for rate in (30.0, 20.0, 10.0, 0.0, 0.0):
        holt.observe(rate)
    assert holt.ahead(50) == 0.0


def test_nothing_seen_is_zero() -> None:
    assert Holt().ahead(5) == 0.0
    assert Seasonal(4).highest(5) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_values_are_held_out(bad: float) -> None:
    holt, seasonal = Holt(), Seasonal(2)
    for rate in (5.0, bad, 5.0, 5.0):
        holt.observe(rate)
        seasonal.observe(rate)
    assert holt.ahead(1) == seasonal.ahead(1) == pytest.approx(5.0)
    assert (holt.ignored, seasonal.ignored) == (1, 1)


def test_a_season_is_learnt_and_told_in_advance() -> None:
    rng = random.Random(0)
    day = [10 + 8 * math.sin(2 * math.pi * i / 24) for i in range(24)]
    seasonal, holt = Seasonal(24), Holt()
    errors = {"seasonal": 0.0, "holt": 0.0}
    for hour in range(24 * 5):
        value = day[hour % 24] + rng.gauss(0, 0.3)
        if hour >= 48:
            errors["seasonal"] += abs(seasonal.ahead(6) - day[(hour + 5) % 24])
            errors["holt"] += abs(holt.ahead(6) - day[(hour + 5) % 24])
        seasonal.observe(value)
        holt.observe(value)
    assert errors["seasonal"] / 72 < 1.0
    assert errors["seasonal"] < 0.25 * errors["holt"]
    assert seasonal.highest(24) == pytest.approx(18, abs=1.5)


def test_lengths_are_of_the_latest_requests_and_keep_their_tail() -> None:
    recent = RecentLengths(window=1000)
    for i in range(2000):
        recent.observe(Lengths(prompt=i + 1, output=10))
    sample = recent.sample(100)
    assert len(sample) == 100
    assert min(each.prompt for each in sample) > 1000
    assert sorted(each.prompt for each in sample)[90] == pytest.approx(1905, abs=10)


def test_something_is_always_computed() -> None:
    assert Lengths(prompt=10, output=1, cached=10).new == 1


def test_a_demand_needs_lengths() -> None:
    with pytest.raises(ValueError, match="without lengths"):
        Demand(1.0, ())


def test_a_trend_that_scatter_alone_would_make_is_not_drawn_on() -> None:
    holt = Holt()
    for rate in (10.0, 10.0, 10.0, 11.0):
        holt.observe(rate)
    assert holt.highest(6) > holt.ahead(0)
    assert holt.highest(6, scatter=2.0) == holt.ahead(0)
    for _ in range(4):
        holt.observe(holt.level + 10.0)
    assert holt.highest(6, scatter=2.0) == holt.highest(6) > holt.ahead(0)
