"""When what a step computes is told, and leaves."""

from __future__ import annotations

import pytest

from cluster.kv.orders import LEAST_BYTES, frame_size, leaves_behind, told_size


@pytest.mark.parametrize(
    ("most", "step", "told"),
    [
        (128 << 20, 1 << 30, 128 << 20),
        (128 << 20, 512 << 20, 64 << 20),
        (64 << 20, 1 << 20, LEAST_BYTES),
        (1 << 20, 1 << 30, 1 << 20),
    ],
)
def test_the_agent_hears_of_a_step_in_eighths_or_frames(most: int, step: int, told: int) -> None:
    assert told_size(most, step) == told


@pytest.mark.parametrize(
    ("most", "step", "frame"),
    [
        (128 << 20, 1 << 30, 128 << 20),
        (128 << 20, 96 << 20, 48 << 20),
        (128 << 20, 1 << 20, LEAST_BYTES),
        (1 << 20, 1 << 30, 1 << 20),
    ],
)
def test_what_does_not_wait_for_bursts_leaves_in_several_frames(
    most: int, step: int, frame: int
) -> None:
    assert frame_size(most, step) == frame


@pytest.mark.parametrize(
    ("step", "last", "leaves"),
    [
        (1 << 30, True, [27, 31]),
        (512 << 20, True, [27, 31]),
        (256 << 20, True, [23, 31]),
        (128 << 20, True, [15, 31]),
        (64 << 20, True, [31]),
        (1 << 30, False, [31]),
    ],
)
def test_over_a_link_a_step_leaves_in_few_bursts(step: int, last: bool, leaves: list[int]) -> None:
    assert [n for n in range(32) if leaves_behind(n, 32, step, last)] == leaves
