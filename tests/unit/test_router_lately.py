"""What a router knows of the last minute."""

from __future__ import annotations

from router.attainment import ATTAINED
from router.lately import KEPT_REQUESTS, WINDOW_SECONDS, Lately, Quantiles


def test_a_young_router_tells_of_its_life() -> None:
    lately = Lately(100.0)
    empty = lately.report(105.0)
    assert (empty.seconds, empty.requests, empty.ttft, empty.tpot) == (5.0, 0, None, None)
    lately.ended(101.0, ATTAINED, [0.1], [0.01])
    lately.ended(102.0, "ttft", [3.0, 0.2])
    lately.ended(103.0, "refused")
    report = lately.report(110.0)
    assert (report.seconds, report.requests, report.attained) == (10.0, 3, 1)
    assert report.missed == {"ttft": 1, "refused": 1}
    assert report.ttft == Quantiles(0.2, 3.0, 3.0)
    assert report.tpot == Quantiles(0.01, 0.01, 0.01)


def test_what_is_older_than_a_minute_is_gone() -> None:
    lately = Lately(0.0)
    lately.ended(100.0, "failed")
    lately.ended(130.0, ATTAINED, [0.5])
    report = lately.report(100.0 + WINDOW_SECONDS + 1)
    assert (report.seconds, report.requests, report.attained) == (WINDOW_SECONDS, 1, 1)
    assert report.missed == {}


def test_of_very_many_the_latest_are_kept_and_their_time_told() -> None:
    lately = Lately(0.0)
    for i in range(2 * KEPT_REQUESTS):
        lately.ended(i * 0.001, ATTAINED, [float(i)])
    now = 2 * KEPT_REQUESTS * 0.001
    report = lately.report(now)
    assert report.requests == report.attained == KEPT_REQUESTS
    assert abs(report.seconds - KEPT_REQUESTS * 0.001) < 1e-6
    assert report.ttft is not None and report.ttft.p50 == 1.5 * KEPT_REQUESTS - 1


def test_quantiles_are_by_nearest_rank() -> None:
    lately = Lately(0.0)
    for i in range(1, 101):
        lately.ended(1.0, ATTAINED, [float(i)])
    assert lately.report(2.0).ttft == Quantiles(50.0, 90.0, 99.0)
