"""What is said of a life that ended, from its log."""

from __future__ import annotations

from pathlib import Path

from cluster.control.life_log import tail, with_cause

STARTED = "the engine of m did not start: "
FOLLOWED = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
LOG = """
(Worker-0 pid=9) ERROR 11-28 10:27:22 [executor.py:953] ValueError: of a life before
(Worker-0 pid=75) ERROR 11-28 10:27:23 [executor.py:953]     raise ValueError(

(Worker-0 pid=75) ERROR 11-28 10:27:23 [executor.py:953] ValueError: too little memory: free some
(EngineCore pid=56) ERROR 11-28 10:27:28 [core.py:1510] Exception: WorkerProc initialization failed
Exception: WorkerProc initialization failed due to an exception in a background process.
"""


def test_where_vllm_points_to_its_log_the_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(LOG)
    said = with_cause(STARTED + FOLLOWED, log, 0)
    assert said == STARTED + "ValueError: too little memory: free some"


def test_a_former_lifes_error_is_not_this_ones(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(LOG)
    former = log.stat().st_size
    assert with_cause(STARTED + FOLLOWED, log, former) == STARTED + FOLLOWED


def test_other_reasons_stay_as_they_are(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text(LOG)
    assert with_cause("no such model", log, 0) == "no such model"
    assert with_cause(STARTED + FOLLOWED, tmp_path / "none.log", 0) == STARTED + FOLLOWED


def test_the_last_lines_that_say_something(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("a\n\nb\n  \nc\n")
    assert tail(log, 2) == ["b", "c"]
    assert tail(tmp_path / "none.log") == []
