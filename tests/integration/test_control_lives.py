"""The controller over a real Ray, in a process of its own: Ray's core reads its authentication mode
when it is first imported, and other tests import it here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = Path(__file__).with_name("control_lives.py")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_control_lives() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SCENARIOS)],
        capture_output=True,
        text=True,
        timeout=220,
        cwd=SCENARIOS.parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
