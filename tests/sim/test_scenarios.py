"""Every scenario file holds. See `interpreter` for the language."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sim.interpreter import play, read, unmet

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


KNOWN = {"slow-ramp": "the planner turns back once more than it should on a slow ramp"}


def scenarios() -> list[Any]:
    """Every scenario; those that are known not to be met must go on failing, or be taken off."""
    return [
        pytest.param(
            path,
            id=path.stem,
            marks=[pytest.mark.xfail(reason=KNOWN[path.stem], strict=True)]
            if path.stem in KNOWN
            else [],
        )
        for path in SCENARIOS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", scenarios())
def test_scenario(path: Path) -> None:
    scenario = read(path)
    assert scenario.expects
    assert unmet(scenario, play(scenario)) == []
