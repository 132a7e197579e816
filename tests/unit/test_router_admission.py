"""So many run, so many wait in order, the rest are sent away with a delay."""

from __future__ import annotations

import pytest

from cluster.errors import Overloaded
from router.admission import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS, Admission


def test_first_come_first_served() -> None:
    admission = Admission(max_running=1, max_queued=2)
    assert admission.offer(0, "a")
    assert not admission.offer(0, "b")
    assert not admission.offer(0, "c")
    assert admission.release(1, "a") == ["b"]
    assert admission.release(2, "b") == ["c"]
    assert admission.release(3, "c") == []
    assert (admission.running, admission.queued) == (0, 0)


def test_beyond_both_limits() -> None:
    admission = Admission(max_running=1, max_queued=1)
    admission.offer(0, "a")
    admission.check()
    admission.offer(0, "b")
    with pytest.raises(Overloaded) as refused:
        admission.offer(0, "c")
    assert MIN_RETRY_SECONDS <= refused.value.retry_after_seconds <= MAX_RETRY_SECONDS
    with pytest.raises(Overloaded):
        admission.check()


def test_no_queue() -> None:
    admission = Admission(max_running=1, max_queued=0)
    admission.offer(0, "a")
    with pytest.raises(Overloaded):
        admission.offer(0, "b")


def test_one_that_leaves_the_queue_makes_room() -> None:
    admission = Admission(max_running=1, max_queued=1)
    admission.offer(0, "a")
    admission.offer(0, "b")
    assert admission.release(1, "b") == []
    assert not admission.offer(1, "c")
    assert admission.release(2, "a") == ["c"]
    assert admission.release(2, "a") == []


def test_the_delay_follows_the_rate() -> None:
    fast, slow = Admission(1, 10), Admission(1, 10)
    for admission, gap in ((fast, 0.1), (slow, 5.0)):
        for i in range(100):
            admission.offer(i * gap, str(i))
            admission.release(i * gap, str(i))
    assert fast.retry_after_seconds() < slow.retry_after_seconds()
