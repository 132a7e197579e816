"""The runtime directory, the timeline and the demo's questions."""

from __future__ import annotations

import importlib.util
import io
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from cluster.cli import profile, record, rundir
from cluster.cli.batch import Job, _show
from cluster.cli.calls import ClusterView, WorkerView
from cluster.cli.checks import engine_bytes
from cluster.cli.demo import _held, make_questions
from cluster.cli.profile import Wanted
from cluster.cli.progress import Progress
from cluster.cli.rundir import RunDir, RunState
from cluster.cli.status import _print
from cluster.cli.terminal import Terminal
from cluster.cli.timeline import BAR_COLUMNS, Handoff, Served, bar, show, spoken_bytes
from cluster.config import ModelConfig
from cluster.errors import ConfigError, InvalidRequest, Unavailable


@pytest.fixture(autouse=True)
def runtime_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_RUNTIME_DIR", str(tmp_path / "run"))


def me(name: str = "c") -> RunState:
    return RunState(name, os.getpid(), psutil.Process().create_time(), "ready", "h:1", "h:2")


def test_the_directory_is_for_its_owner_only() -> None:
    own = RunDir("c")
    own.acquire()
    own.write(me())
    own.write_store_url("redis://:secret@h/0")
    assert stat.S_IMODE(own.path.stat().st_mode) == 0o700
    for name in ("state.json", "store_url"):
        assert stat.S_IMODE((own.path / name).stat().st_mode) == 0o600


def test_a_root_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run").chmod(0o1777)  # as /tmp is
    own = RunDir("c")
    own.acquire()
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o1777
    assert stat.S_IMODE(own.path.stat().st_mode) == 0o700


def test_a_name_is_taken_once() -> None:
    RunDir("c").acquire()
    with pytest.raises(ConfigError, match="already runs here"):
        RunDir("c").acquire()


def test_a_dead_cluster_or_a_reused_pid_is_not_found() -> None:
    own = RunDir("c")
    own.acquire()
    own.write(me())
    assert rundir.find(None) == me()
    own.write(replace(me(), pid_started=1.0))
    with pytest.raises(Unavailable, match="no cluster runs here"):
        rundir.find(None)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    own.write(replace(me(), pid=gone.pid))
    assert own.read() is None


def test_several_clusters_want_a_name() -> None:
    for name in ("a", "b"):
        own = RunDir(name)
        own.acquire()
        own.write(me(name))
    with pytest.raises(Unavailable, match="--name"):
        rundir.find(None)
    assert rundir.find("b").name == "b"


def test_bars_share_one_scale() -> None:
    assert bar(1.0) == "█" * BAR_COLUMNS
    assert bar(0.0) == ""
    assert len(bar(0.0001)) == 1
    assert bar(0.5) == "█" * (BAR_COLUMNS // 2)
    assert [spoken_bytes(n) for n in (0, 1536, 3 << 20, 5 << 30)] == [
        "0 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
    ]


def test_the_timeline_names_phases_workers_and_what_moved() -> None:
    handoff = Handoff("grpc", 3 << 20, 31, 62, 32, 0.004)
    served = Served("p-0", "d-0", {"prefill": 0.25, "decode": 0.5}, handoff, 0.3, 0.02, 999, 0, 6)
    out = io.StringIO()
    show(Console(file=out, width=120), served)
    text = out.getvalue()
    for said in (
        "handoff_wait        0.0 ms",
        "250.0 ms",
        "prefill on p-0, decode on d-0",
        "3.0 MiB over grpc in 31 blocks and 62 messages",
        "already held 32 tokens",
    ):
        assert said in text


def test_plain_progress_is_one_line_per_change() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=80)) as progress:
        for detail in ("loading", "loading", "warming up"):
            progress.show("w", "starting", detail)
        progress.show("w", "ready")
    lines = [line.split("s  ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == ["w: starting loading", "w: starting warming up", "w: ready"]


def test_the_demo_asks_the_same_long_prompt_twice_and_knows_every_answer() -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "recall_task.py"
    spec = importlib.util.spec_from_file_location("recall_task_for_test", path)
    assert spec is not None and spec.loader is not None
    task = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = task
    spec.loader.exec_module(task)
    short, long, again, chat = make_questions(task)
    assert long.prompt == again.prompt != short.prompt
    assert chat.prompt.chat[-1][0] == "user"
    for question in (short, long, again, chat):
        text = question.prompt.text or question.prompt.chat[-1][1]
        assert question.answer in text


def test_a_ledger_that_is_not_at_zero_is_named() -> None:
    idle = WorkerView(
        "w-0", "m", "decode", "ready", True, 0, 0, 0, 0, 9, 1, "grpc", "h:1", "aa", ""
    )
    assert _held(ClusterView("c", True, (idle,))) == []
    (said,) = _held(ClusterView("c", True, (replace(idle, pinned_blocks=2, pinned_bytes=2048),)))
    assert said == "w-0 holds 2 blocks (2.0 KiB), 0 sequences"
    assert _held(ClusterView("c", True)) == ["no worker answered"]


def test_status_says_what_a_worker_waits_for_however_narrow_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    why = "for 1 GPU, pool=decode; no host has 1 GPU: none has any"
    waits = WorkerView(
        "m-decode-0", "m", "decode", "waiting", False, 0, 0, 0, 0, 0, 0, "", "", "", why
    )
    _print(Terminal(), ClusterView("c", True, (waits,)), {})
    assert f"m-decode-0 waiting: {why}" in " ".join(capsys.readouterr().out.split())


def test_a_narrow_terminal_cuts_nothing_of_a_job_but_its_endpoint() -> None:
    terminal, out = Terminal(), io.StringIO()
    terminal.out = Console(file=out, width=80)
    name = "batch_5d64880f1e04aa04b455c5c7"
    job = Job(name, "in_progress", "/v1/chat/completions", 12, 9, 3, 1.8e9, 0.0)
    assert _show(terminal, [job], as_json=False, one=True) == 0
    head, row = out.getvalue().splitlines()
    assert head.split()[:6] == ["batch", "state", "lines", "done", "failed", "created"]
    assert row.split()[:5] == [name, "in_progress", "12", "9", "3"]
    assert "…" not in row.partition("/v1")[0]


def test_simulated_engines_are_not_counted_as_real_ones(tmp_path: Path) -> None:
    model = {"name": "m", "path": str(tmp_path), "max_model_len": 64, "kv_cache_bytes": 1 << 30}
    real = ModelConfig.model_validate(model)
    simulated = ModelConfig.model_validate({**model, "engine": "simulated"})
    assert engine_bytes(simulated) * 10 < engine_bytes(real)


def test_a_profile_that_cannot_be_written_is_not_measured_first() -> None:
    wanted = Wanted("llama-3.1-8b", "H200", 1, "", 1024, 8, Path("/dev/null/profile.json"))
    with pytest.raises(InvalidRequest, match=r"profile\.json cannot be written: Not a dir"):
        profile.run(Terminal(), "127.0.0.1:1", "", wanted, as_json=False)


def test_a_record_that_is_there_outlives_a_cluster_that_does_not_answer(tmp_path: Path) -> None:
    out = tmp_path / "requests.jsonl"
    out.write_text("of yesterday\n")
    with pytest.raises(Unavailable):
        record.run(Terminal(), "127.0.0.1:1", "", out, 1.0, "")
    assert out.read_text() == "of yesterday\n"
