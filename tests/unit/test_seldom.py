"""A stranger's noise is told of, and does not fill the log."""

from __future__ import annotations

import logging

import pytest

from cluster.kv.seldom import Seldom


def test_lines_are_few_and_the_rest_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    seldom = Seldom(logging.getLogger("noise"), seconds=1.0, clock=lambda: now)
    for now in (100.0, 100.1, 100.9, 101.0, 101.5, 103.0):
        seldom.warning("refused: %s", now)
    assert [record.getMessage() for record in caplog.records] == [
        "refused: 100.0",
        "refused: 101.0 (and 2 more of late)",
        "refused: 103.0 (and 1 more of late)",
    ]
