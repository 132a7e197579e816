"""Every scenario file holds. See `interpreter` for the language."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.interpreter import play, read, unmet

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.slow
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    scenario = read(path)
    assert scenario.expects
    assert unmet(scenario, play(scenario)) == []
