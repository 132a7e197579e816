"""Whatever workers' clocks say, phases are never negative and add up to the end-to-end time."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.output import WorkerReport
from router.phases import Stamps

stamp = st.none() | st.floats(-50, 150)


@given(st.lists(stamp, min_size=6, max_size=6), st.floats(0, 100))
def test_any_stamps_add_up(stamps: list[float | None], finished: float) -> None:
    placed, prefill, first, landed, decode, second = stamps
    phases = Stamps(0.0, placed, prefill, first, landed, decode, second).phases(finished)
    values = list(asdict(phases).values())
    assert min(values) >= 0
    assert sum(values) == pytest.approx(finished)


def test_a_transfer_that_prefill_hid_costs_no_wait() -> None:
    stamps = Stamps(0.0, placed=1.0, first_token=3.0)
    report = WorkerReport(landed_ago=7.5, scheduled_ago=6.5, second_token_ago=6.0)
    stamps.decode_reported(10.0, report)
    phases = stamps.phases(10.0)
    assert phases.handoff_wait == 0
    assert phases.decode_queue == pytest.approx(0.5)
    assert phases.first_step == pytest.approx(0.5)
    assert phases.decode == pytest.approx(6.0)


def test_what_did_not_happen_takes_no_time() -> None:
    stamps = Stamps(0.0, placed=1.0, first_token=2.0)
    stamps.prefill_reported(2.0, WorkerReport(scheduled_ago=0.5))
    phases = stamps.phases(2.0)
    assert (phases.queue, phases.prefill_queue, phases.prefill) == (1.0, 0.5, 0.5)
    assert phases.handoff_wait == phases.decode_queue == phases.first_step == phases.decode == 0
