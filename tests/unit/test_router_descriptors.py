"""The limit of open files is raised as far as it may be, and what is missing is said."""

from __future__ import annotations

import resource

import pytest

from router.descriptors import SPARE, allow


@pytest.mark.parametrize(
    ("limits", "connections", "enough", "after"),
    [
        ((1024, 4096), 100, True, (1024, 4096)),
        ((1024, 4096), 2000, True, (2000 + SPARE, 4096)),
        ((1024, 4096), 9000, False, (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), 9000, True, (9000 + SPARE, resource.RLIM_INFINITY)),
    ],
)
def test_limits(
    limits: tuple[int, int],
    connections: int,
    enough: bool,
    after: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = list(limits)
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: now.__setitem__(slice(None), new))
    assert allow(connections) is enough
    assert tuple(now) == after
    assert ("LimitNOFILE" in caplog.text) is not enough
