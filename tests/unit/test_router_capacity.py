"""What the pools take, and whether targets were met."""

from __future__ import annotations

import math

import pytest

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
from router.capacity import Capacities, capacity
from router.generation import Slo
from router.output import Completed, CompletionReport, Phases

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
    assert capacity(MODEL, workers, 1) == Capacity(600, 200, 1600, 16)
    assert capacity(MODEL, workers, 2) == Capacity(300, 200, 1600, 16)
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
