"""Queueing formulas: identities, limits and laws that hold for every load."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.planner.queueing import (
    Wait,
    erlang_c,
    md1_ttft,
    md1_ttft_pipeline,
    md1_ttft_tensor,
    poisson_at_most,
    wait_mgc,
)

loads = st.floats(0.01, 0.97)
services = st.floats(0.001, 10.0)


@given(loads, services)
def test_two_stages_are_one_queue_of_half_the_service_and_then_the_other_half(
    load: float, service: float
) -> None:
    rate = load / service
    half = md1_ttft(rate, service / 2) + service / 2
    assert md1_ttft_pipeline(rate, service) == pytest.approx(half)


@given(loads, services, st.floats(1.01, 2.0))
def test_tensor_parallel_is_one_queue_that_is_faster(load: float, service: float, k: float) -> None:
    rate = load / service
    assert md1_ttft_tensor(rate, service, k) == pytest.approx(md1_ttft(rate, service / k))


@given(loads, services)
def test_one_server_waits_as_m_d_1(load: float, service: float) -> None:
    rate = load / service
    wait = wait_mgc(rate, 1, service, scv=0.0)
    assert service + wait.overall_mean == pytest.approx(md1_ttft(rate, service))


@given(loads, st.integers(1, 200))
def test_pooled_servers_wait_less(load: float, servers: int) -> None:
    one = wait_mgc(load, 1, 1.0, 1.0)
    many = wait_mgc(load * servers, servers, 1.0, 1.0)
    assert many.overall_mean <= one.overall_mean + 1e-12
    assert 0 <= erlang_c(servers, load * servers) <= 1


@given(loads, st.floats(0, 4), st.floats(0.5, 0.999))
def test_the_quantile_is_where_the_tail_is(load: float, scv: float, q: float) -> None:
    wait = wait_mgc(load, 1, 1.0, scv)
    assert wait.longer_than(wait.quantile(q)) <= 1 - q + 1e-9


@given(st.floats(1.0, 5.0), services)
def test_overload_waits_for_ever(load: float, service: float) -> None:
    rate = load / service * 1.001
    assert math.isinf(md1_ttft(rate, service))
    assert wait_mgc(rate, 1, service, 1.0).longer_than(1e9) == 1.0
    assert math.isinf(wait_mgc(rate, 1, service, 1.0).quantile(0.5))


def test_no_load_and_no_servers() -> None:
    assert wait_mgc(0.0, 3, 1.0, 1.0) == Wait(0.0, 0.0)
    assert math.isinf(wait_mgc(0.0, 0, 1.0, 1.0).mean)


@given(st.floats(0.1, 400), st.integers(0, 500))
def test_poisson_is_a_distribution(mean: float, limit: int) -> None:
    assert 0 <= poisson_at_most(mean, limit) <= poisson_at_most(mean, limit + 1) + 1e-9 <= 1 + 2e-9
    assert poisson_at_most(mean, mean + 8 * math.sqrt(mean) + 8) > 0.999


def test_poisson_is_exact_where_it_is_small() -> None:
    assert poisson_at_most(2.0, 1) == pytest.approx(3 * math.exp(-2.0))
    assert poisson_at_most(100.5, 100) == pytest.approx(0.5065, abs=0.01)
