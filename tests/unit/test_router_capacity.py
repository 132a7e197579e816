"""What the pools take, and whether targets were met."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ModelConfig
from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PdserveError,
    Unavailable,
)
from cluster.store.records import WorkerRecord
from router.admission.offers import Capacity
from router.attainment import ATTAINED, missed
from router.capacity import LEAST_PACED, PACE_HEADROOM, Capacities, Paces, capacity
from router.curves import Curves
from router.fleet import Fleet
from router.generation import Slo
from router.output import Completed, CompletionReport, Phases
from router.placement import Target, WorkerView

MODEL = ModelConfig(name="m", path="p", max_num_batched_tokens=100, max_num_seqs=8)


def worker(role: str, state: str = "ready", blocks: int = 50, model: str = "m") -> WorkerRecord:
    return WorkerRecord(role, "x", model, role, state, num_blocks=blocks, block_size=16)  # type: ignore[arg-type]


def test_capacity_is_that_of_the_ready_workers() -> None:
    workers = [
        worker("prefill"),
        worker("prefill"),
        worker("prefill", "starting"),
        worker("decode"),
        worker("decode", model="other"),
        worker("both"),
    ]
    assert capacity(MODEL, workers, 1) == Capacity(600, 200, 1600, 16, decode_workers=2)
    assert capacity(MODEL, workers, 2) == Capacity(300, 200, 1600, 16, decode_workers=2)
    assert capacity(MODEL, workers, 9).prefill_tokens == 200


def test_without_workers_nothing_is_held_back() -> None:
    assert capacity(MODEL, [worker("prefill")], 1) == Capacity()
    stands_in = capacity(MODEL, [worker("prefill")], 1, "auto")
    assert stands_in == capacity(MODEL, [worker("both")], 1)
    assert capacity(MODEL, [worker("both", blocks=0)], 1).kv_tokens == math.inf


def test_it_follows_the_registry() -> None:
    class Members:
        records: tuple[WorkerRecord, ...] = (worker("both"),)
        routers = 1

    members = Members()
    capacities = Capacities([MODEL], members)
    assert capacities()["m"].sequences == 8
    members.records = (worker("both"), worker("both"))
    assert capacities()["m"].sequences == 16


def fleet(*roles: str) -> Fleet:
    fleet = Fleet()
    for i, role in enumerate(roles):
        fleet.join(WorkerView(Target(f"w{i}", "x"), "m", role, True, True, "layout"))
    return fleet


def learn_steps(fleet: Fleet, slot: int, each: float) -> None:
    """A step takes `each` seconds per sequence."""
    for _ in range(60):
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            fleet.saw_step(slot, batch, each * batch)


def test_decodes_that_keep_a_bound_per_token() -> None:
    seen = fleet("prefill", "decode", "decode")
    paces = Paces(seen, "auto")
    learn_steps(seen, 1, 1e-3)
    learn_steps(seen, 2, 2e-3)
    ideal = PACE_HEADROOM * 0.1 * (1000 + 500)
    assert paces.within("m", 0.1) == pytest.approx(ideal, rel=0.03)
    assert paces.within("m", 0.2) == pytest.approx(2 * ideal, rel=0.03)
    learn_steps(seen, 1, 2e-3)
    assert paces.within("m", 0.1) == pytest.approx(PACE_HEADROOM * 0.1 * 1000, rel=0.03)
    assert paces.within("m", math.inf) == math.inf
    assert paces.within("other", 0.1) == math.inf


def test_what_prompts_and_steps_take_is_expected_as_placement_learned_it() -> None:
    seen = fleet("prefill", "decode", "decode")
    learn_steps(seen, 1, 1e-3)
    learn_steps(seen, 2, 3e-3)
    seen.saw_prefill(0, 1000, 0.7)
    expected = Paces(seen, "always").of(Capacity(), "m")
    assert expected.prefill_seconds(1000) == pytest.approx(0.7, rel=0.01)
    assert expected.step_seconds(64) == pytest.approx(32 * (1e-3 + 3e-3) / 2, rel=0.03)
    nobody = Paces(seen, "always").of(Capacity(), "other")
    assert nobody.prefill_seconds(1000) == nobody.step_seconds(64) == 0.0


def test_a_bound_that_cannot_be_kept_bounds_nothing() -> None:
    seen = fleet("decode", "both")
    learn_steps(seen, 0, 1e-3)
    learn_steps(seen, 1, 20e-3)
    paces = Paces(seen, "auto")
    assert paces.within("m", 1e-4) == math.inf
    assert paces.within("m", 4e-3) == 2 * LEAST_PACED  # too little to be believed


def test_who_stands_in_for_decode_workers_sets_their_pace() -> None:
    seen = fleet("prefill")
    learn_steps(seen, 0, 1e-3)
    assert Paces(seen, "always").within("m", 0.1) == math.inf
    assert Paces(seen, "auto").within("m", 0.1) == pytest.approx(PACE_HEADROOM * 100, rel=0.05)


@given(
    seconds=st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=40),
    sizes=st.lists(st.integers(1, 2000), min_size=40, max_size=40),
    bound=st.floats(1e-4, 2.0),
)
def test_a_curve_within_a_bound(seconds: list[float], sizes: list[int], bound: float) -> None:
    curves = Curves(0, 11, lambda batch: 5e-3 + 6e-5 * batch)
    curves.resize(1)
    for size, took in zip(sizes, seconds, strict=False):
        curves.observe(0, size, took)
    largest = float(curves.within(bound, np.array([0]))[0])
    # With the knots: a curve that falls again is above a bound at one of them, and near it only.
    tried = np.union1d(2.0 ** np.linspace(0.0, 10.0, 200), 2.0 ** np.arange(11))
    for size in tried:
        if size <= largest:
            assert curves.one(size, 0) <= bound * 1.0001
    if largest < tried[-1]:
        assert any(curves.one(size, 0) > bound * 0.9999 for size in (largest or 1.0, *tried))


def completed(ttft: float, tpot: float) -> Completed:
    report = CompletionReport(0, 5, "p", "d", Phases(), None, 0, ttft, tpot)
    return Completed(1, 5, 0, (report,))


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (completed(1.0, 0.1), ATTAINED),
        (completed(1.1, 0.0), "ttft"),
        (completed(0.1, 0.2), "tpot"),
        (Overloaded("full"), "refused"),
        (DeadlineExceeded("late"), "deadline"),
        (Unavailable("lost"), "failed"),
        (PdserveError("bug"), "failed"),
        (Cancelled("gone"), "cancelled"),
        (InvalidRequest("n", "too many"), None),
    ],
)
def test_attainment(end: Completed | PdserveError, reason: str | None) -> None:
    assert missed(Slo(ttft_seconds=1.0, tpot_seconds=0.1), end) == reason
