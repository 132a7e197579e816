"""From what routers counted to what the planner sees; what a router counts."""

from __future__ import annotations

import pytest

from cluster.control.traffic import TrafficBook
from cluster.planner.demand import Lengths
from router.demand import FIRST_OUTPUT_TOKENS, KEPT_ARRIVALS, DemandLog, PrefillStep

KIND = ("m", "interactive")
LIFE, OTHER = ("router-0", "a"), ("router-1", "b")


def test_rates_are_of_arrivals_between_two_looks_refused_ones_too() -> None:
    book, log = TrafficBook(), DemandLog()
    log.arrived(0.0, "before", KIND, 10, 10)
    assert book.look(0.0, {LIFE: log.since(book.mark(LIFE))}) is None  # only begins the count
    for i in range(6):
        log.arrived(1.0 + i / 10, f"r{i}", KIND, 100, 50)
    log.refused(2.0, KIND)
    log.refused(2.1, KIND)
    look = book.look(4.0, {LIFE: log.since(book.mark(LIFE))})
    assert look is not None
    traffic = look.traffic["m"]["interactive"]
    assert traffic.rate == 2.0
    assert traffic.lengths == (Lengths(100, 50, 0),) * 6
    assert look.queued == {"m": 610}
    again = book.look(5.0, {LIFE: log.since(book.mark(LIFE))})
    assert again is not None and again.traffic["m"]["interactive"].rate == 0.0
    assert again.traffic["m"]["interactive"].lengths == ()


def test_a_router_that_starts_anew_counts_from_nothing() -> None:
    book, first, second = TrafficBook(), DemandLog(), DemandLog()
    for i in range(5):
        first.arrived(0.0, str(i), KIND, 1, 1)
    book.look(0.0, {LIFE: first.since(None)})
    second.arrived(1.0, "x", KIND, 1, 1)
    look = book.look(2.0, {("router-0", "next"): second.since(None), OTHER: first.since(None)})
    assert look is not None
    assert look.traffic["m"]["interactive"].rate == (1 + 5) / 2


def test_outputs_are_expected_as_a_share_of_what_is_allowed() -> None:
    log = DemandLog()
    log.arrived(0.0, "a", KIND, 100, 4000)
    log.completed(KIND, used=0.5, cached=0.25)
    log.arrived(1.0, "b", KIND, 100, 40)
    log.arrived(2.0, "c", KIND, 1, 800)
    first, second, third = log.since((0, 0)).lengths
    assert first.output == FIRST_OUTPUT_TOKENS
    assert (second.output, second.cached) == (20, 25)
    assert (third.output, third.cached) == (400, 0)  # the last prompt token is always computed


def test_the_backlog_is_what_has_no_first_token() -> None:
    log = DemandLog()
    log.arrived(0.0, "a", KIND, 100, 1)
    log.arrived(0.0, "b", KIND, 50, 1)
    log.computed("a")
    log.computed("a")  # its end is told as well
    assert log.since(None).queued_prompt_tokens == {"m": 50}
    log.computed("b")
    assert log.since(None).queued_prompt_tokens == {"m": 0}


def test_what_nobody_asks_for_is_dropped_and_never_told_twice() -> None:
    log = DemandLog()
    for i in range(KEPT_ARRIVALS + 10):
        log.arrived(float(i), str(i), KIND, i + 1, 1)
        log.computed(str(i))
    log.measured(PrefillStep("m", 1, 0, 0.1))
    report = log.since((0, 0))
    assert len(report.lengths) == KEPT_ARRIVALS and report.lengths[-1].prompt == KEPT_ARRIVALS + 10
    assert report.steps and log.since(report.mark).lengths == log.since(report.mark).steps == ()
    assert log.since((10**6, 10**6)).lengths == ()  # a mark of another life
    assert report.burstiness[KIND] == pytest.approx(0.0, abs=0.05)  # as regular as can be


def test_attainment_is_of_late() -> None:
    book, log = TrafficBook(), DemandLog()
    log.counted(KIND, True)
    book.look(0.0, {LIFE: log.since(None)})
    for good in (True, True, False, True):
        log.counted(KIND, good)
    book.look(5.0, {LIFE: log.since(None)})
    assert book.attainment("m") == {"interactive": 4 / 5}
    book.look(1000.0, {LIFE: log.since(None)})
    assert book.attainment("m") == {} and book.attainment("other") == {}
