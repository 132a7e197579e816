"""A request's trace: phases in a row, the handoff ending where the KV had landed."""

from __future__ import annotations

import pytest

from router.output import Completed, CompletionReport, Handoff, Phases
from router.spans import overlap, request_spans

MOVED = Handoff("grpc", 100, 2, 0, 3, transfer_seconds=1.0, elapsed_seconds=2.0)
PHASES = Phases(queue=1.0, prefill=2.0, handoff_wait=0.5, decode=3.0)


def report(handoff: Handoff | None) -> CompletionReport:
    return CompletionReport(0, 5, "p", "d", PHASES, handoff, 0, 3.0, 0.1)


def test_phases_follow_each_other_and_the_handoff_ends_with_the_wait() -> None:
    spans = request_spans(10.0, 16.5, {"a": 1}, Completed(1, 5, 0, (report(MOVED),)))
    assert [(s.name, s.start, s.end) for s in spans] == [
        ("request", 10.0, 16.5),
        ("queue", 10.0, 11.0),
        ("prefill", 11.0, 13.0),
        ("handoff_wait", 13.0, 13.5),
        ("kv_handoff", 11.5, 13.5),
        ("decode", 13.5, 16.5),
    ]
    assert spans[4].attributes["overlap_ratio"] == pytest.approx(0.75)


def test_a_failed_request_has_its_own_span_only() -> None:
    assert [s.name for s in request_spans(1.0, 2.0, {}, None)] == ["request"]


def test_what_moved_nothing_hid_all_of_it() -> None:
    assert overlap(report(None)) == 1.0
