"""The circuit breaker: who is left alone, for how long, and how it comes back."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from router.breaker import CONSECUTIVE, FIRST_REST_SECONDS, MAX_REST_SECONDS, Breaker
from router.fleet import Fleet
from router.joint import JointPlacement
from router.output import Stage
from router.placement import Decision, Demand, Target, WorkerView
from router.share import Share


def pool(size: int) -> Breaker:
    breaker = Breaker()
    for slot in range(size):
        breaker.join(slot)
    return breaker


def fail(breaker: Breaker, slot: int, times: int, now: float = 0.0) -> bool:
    return [breaker.failed(now, slot) for _ in range(times)][-1]


def test_failures_in_a_row_eject_and_a_success_between_does_not() -> None:
    breaker = pool(4)
    assert not fail(breaker, 0, CONSECUTIVE - 1)
    breaker.succeeded(0)
    assert not fail(breaker, 0, CONSECUTIVE - 1)
    assert fail(breaker, 0, 1) and breaker.ejected(0)


def test_one_sequence_tries_it_and_its_success_brings_it_back() -> None:
    breaker = pool(4)
    fail(breaker, 0, CONSECUTIVE)
    assert breaker.due(FIRST_REST_SECONDS - 0.1) == []
    assert breaker.due(FIRST_REST_SECONDS) == [0]
    breaker.started(FIRST_REST_SECONDS, 0)
    assert breaker.due(FIRST_REST_SECONDS) == []
    assert breaker.succeeded(0) and not breaker.ejected(0)


def test_every_failed_try_doubles_the_rest() -> None:
    breaker, now, rests = pool(4), 0.0, []
    fail(breaker, 0, CONSECUTIVE)
    for _ in range(8):
        began = now
        while not breaker.due(now):
            now += 0.5
        rests.append(now - began)
        breaker.started(now, 0)
        breaker.failed(now, 0)
    assert rests[:4] == [2, 4, 8, 16] and rests[-1] == MAX_REST_SECONDS


def test_a_worker_that_fails_far_more_often_than_its_peers_stands_out() -> None:
    breaker = pool(4)
    for i in range(60):
        for slot in range(1, 4):
            breaker.succeeded(slot)
        if i % 2:
            breaker.succeeded(0)
        elif breaker.failed(0.0, 0, shared=True):
            break
    assert breaker.ejected(0)


def test_a_shared_fault_ejects_nobody() -> None:
    breaker = pool(4)
    for _ in range(100):
        for slot in range(4):
            assert not breaker.failed(0.0, slot, shared=True)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=200), st.integers(1, 6))
def test_half_of_a_pool_is_never_left_alone(events: list[tuple[int, bool]], size: int) -> None:
    breaker = pool(size)
    for now, (slot, ok) in enumerate(events):
        breaker.succeeded(slot) if ok else breaker.failed(float(now), slot)
        out = sum(breaker.ejected(s) for s in range(size))
        assert out <= max(1, size // 2) and (size > 1 or out == 0)


def test_placement_leaves_it_alone_until_its_rest_is_over() -> None:
    fleet = Fleet()
    for i in range(3):
        fleet.join(WorkerView(Target(f"d{i}", "x"), "m", "decode", True, True, "l"))
    placement = JointPlacement(fleet, "never", random.Random(1))

    def chosen(now: float) -> set[int]:
        fleet.tick(now)
        decisions = [placement.place(now, Demand("m", 10, 10, True)) for _ in range(40)]
        assert all(isinstance(d, Decision) for d in decisions)
        return {d.chosen.slots[0] for d in decisions if isinstance(d, Decision)}

    for _ in range(CONSECUTIVE):
        fleet.failed(0.0, 1, shared=False)
    assert chosen(1.0) == {0, 2}
    assert 1 in chosen(3.0)
    share = Share(1, Stage.WHOLE, 10, 10.0, 0.01)
    fleet.take(3.0, share)
    assert chosen(3.1) == {0, 2}
    fleet.answered(3.2, share)
    fleet.release(3.3, share)
    assert 1 in chosen(3.4)
