"""What a profile makes of the tokens that came: windows, samples, time that something covers."""

from __future__ import annotations

import pytest

from cluster.cli.profile_served import (
    Served,
    busy_seconds,
    launches_of,
    samples_of,
    steps_within,
)
from cluster.planner.profile import LaunchSample, PathSample


def served(begins: float, step: float, tokens: int, worker: str = "d", prompt: int = 100) -> Served:
    came = tuple((begins + i * step, i + 1) for i in range(tokens))
    path = PathSample(prompt, 0, 0.01, 0.01)
    return Served(0.02, prompt, 0, worker, None, path, (begins - 0.02, begins), came)


def test_a_window_is_the_time_in_which_all_run() -> None:
    window = steps_within([served(0.0, 0.01, 100), served(0.3, 0.01, 100)])
    assert window is not None
    assert window.begins == pytest.approx(0.32)  # the second one's third token
    assert window.ends == pytest.approx(0.99)  # the first one's last
    assert window.steps == pytest.approx(67, abs=0.01)
    # 33 to 100 tokens of the first one are there, 3 to 70 of the second one.
    assert window.context == pytest.approx(100 + 66.5 + 100 + 36.5)


def test_a_batch_that_never_ran_as_a_whole_says_nothing() -> None:
    assert steps_within([served(0.0, 0.01, 30), served(0.4, 0.01, 30)]) is None
    assert steps_within([served(0.0, 0.01, 4)]) is None
    assert samples_of([served(0.0, 0.01, 30), served(0.4, 0.01, 30)]) == []


def test_each_worker_has_a_sample_of_its_part() -> None:
    batch = [served(0.0, 0.01, 60), served(0.1, 0.01, 60), served(0.0, 0.02, 60, worker="e")]
    samples = {s.batch: s for s in samples_of(batch)}
    assert samples[2].seconds == pytest.approx(0.01)
    assert samples[1].seconds == pytest.approx(0.02)
    assert samples[1].context == pytest.approx(100 + (3 + 60) / 2, abs=0.5)


def test_tokens_that_came_together_count_as_many_steps() -> None:
    whole = served(0.0, 0.01, 80)
    pairs = tuple(at for at in whole.came if at[1] % 2 == 0)
    together = Served(**{**vars(whole), "came": pairs})
    window = steps_within([together])
    assert window is not None
    assert window.seconds / window.steps == pytest.approx(0.01)


def test_time_that_is_covered_twice_counts_once() -> None:
    spans = [(0.0, 2.0), (1.0, 3.0), (1.5, 1.6), (5.0, 9.0), (20.0, 30.0)]
    assert busy_seconds(spans, 0.5, 6.0) == pytest.approx(2.5 + 1.0)
    assert busy_seconds([], 0.0, 1.0) == 0.0


def computed(
    began: float, told: float, waited: float, worker: str = "p", prompt: int = 100, cached: int = 0
) -> Served:
    path = PathSample(prompt, 0, 0.01, 0.01)
    return Served(
        told - began, prompt, cached, "d", None, path, (began, told), ((told, 1),), worker, waited
    )


def test_launches_are_those_of_steps_behind_another_that_were_waited_for() -> None:
    stream = [
        computed(0.000, 0.035, 0.0),
        computed(0.020, 0.050, 0.015),
        computed(0.021, 0.050, 0.002, prompt=50, cached=20),  # the same step
        computed(0.035, 0.070, 0.010),
        computed(0.050, 0.070, 0.010),
        # It came when the engine had nothing to do: the one before it was over.
        computed(0.100, 0.130, 0.0),
        computed(0.120, 0.150, 0.001),  # it had not waited: the engine had
        computed(0.010, 0.045, 0.0, worker="q"),
    ]
    assert [(s.new, round(s.seconds, 6)) for s in launches_of(reversed(stream))] == [
        (130, 0.015),
        (100, 0.015),
    ]
    assert launches_of([]) == [] and isinstance(launches_of(stream)[0], LaunchSample)
