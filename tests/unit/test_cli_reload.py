"""`pdserve reload` and `pdserve up`, through the runtime directory."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from cluster.cli import reload as command
from cluster.cli.reload import Reloads
from cluster.cli.rundir import RunDir, RunState
from cluster.cli.terminal import Terminal
from cluster.config import Config
from cluster.config_changes import flatten
from cluster.errors import ConfigError, Unavailable


class RunningCluster:
    """A cluster that takes configurations over as `launch.Cluster` does."""

    def __init__(self, rundir: RunDir) -> None:
        self.rundir = rundir
        self.taken: list[Config] = []
        self.complaints: list[str] = []

    async def reload(self, config: Config) -> list[str]:
        self.taken.append(config)
        self.rundir.write_config(flatten(config))
        return self.complaints


@pytest.fixture
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("PDSERVE_RUNTIME_DIR", str(tmp_path / "run"))
    own = RunDir("c")
    own.acquire()
    own.write(RunState("c", os.getpid(), psutil.Process().create_time(), "ready", "h:1", "h:2"))
    own.write_config(flatten(Config.load(file(tmp_path))))
    return own


def file(folder: Path, **sections: object) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(json.dumps({"name": "c", "models": [{"name": "m", "path": "p"}], **sections}))
    return path


async def reloaded(
    rundir: RunDir, given: Path, complaints: Sequence[str] = ()
) -> tuple[str, RunningCluster]:
    """What the command prints, with `pdserve up` answering beside it."""
    cluster = RunningCluster(rundir)
    cluster.complaints += complaints
    reloads = Reloads(cluster, rundir, Config.load)  # type: ignore[arg-type]
    terminal = Terminal()
    out = io.StringIO()
    terminal.out = Console(file=out, width=200)
    asking = asyncio.create_task(asyncio.to_thread(command.reload, terminal, None, given))
    while not asking.done():
        await reloads.answer()
        await asyncio.sleep(0.01)
    await asking
    return out.getvalue(), cluster


@pytest.mark.parametrize("bad", ["name: 2026-99-99", "? [a, b]\n: c", "[" * 5000, "{", "- a"])
async def test_no_file_ends_a_cluster_that_runs(rundir: RunDir, tmp_path: Path, bad: str) -> None:
    (tmp_path / "bad.yaml").write_text(bad)
    with pytest.raises(ConfigError, match=r"bad\.yaml: "):
        await reloaded(rundir, tmp_path / "bad.yaml")


async def test_nor_does_what_nobody_thought_of(rundir: RunDir, tmp_path: Path) -> None:
    def load(_: Path | None) -> Config:
        raise KeyError("a bug")

    reloads = Reloads(RunningCluster(rundir), rundir, load)  # type: ignore[arg-type]
    (rundir.path / "reload.request").write_text(json.dumps({"id": "x", "file": ""}))
    await reloads.answer()
    reply = json.loads((rundir.path / "reload.reply").read_text())
    assert reply["id"] == "x" and "KeyError" in reply["error"]


async def test_live_fields_are_taken_over_and_told(rundir: RunDir, tmp_path: Path) -> None:
    said, cluster = await reloaded(rundir, file(tmp_path, targets={"ttft_seconds": 1}))
    assert said == "targets.ttft_seconds: 2.0 → 1.0\nreloaded\n"
    assert [config.targets.ttft_seconds for config in cluster.taken] == [1]
    said, cluster = await reloaded(rundir, file(tmp_path, targets={"ttft_seconds": 1}))
    assert (said, cluster.taken) == ("nothing has changed\n", [])


async def test_tenants_credentials_are_read_again_and_what_fails_is_told(
    rundir: RunDir, tmp_path: Path
) -> None:
    tenants = [{"name": "t", "token_env": "T"}]
    await reloaded(rundir, file(tmp_path, tenants=tenants))
    said, cluster = await reloaded(rundir, file(tmp_path, tenants=tenants), ["router-0: no T"])
    assert said == "not taken over: router-0: no T\nreloaded\n"
    assert len(cluster.taken) == 1


async def test_one_field_that_is_not_live_refuses_all(rundir: RunDir, tmp_path: Path) -> None:
    before = rundir.read_config()
    given = file(tmp_path, targets={"ttft_seconds": 1}, handoff={"ticket_seconds": 9})
    with pytest.raises(
        ConfigError, match=r"nothing was changed:\n  handoff\.ticket_seconds: it is"
    ):
        await reloaded(rundir, given)
    assert rundir.read_config() == before


async def test_a_file_with_an_error_is_refused_in_its_words(rundir: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="roter"):
        await reloaded(rundir, file(tmp_path, roter={}))


def test_a_cluster_that_does_not_answer_is_not_waited_for_for_ever(
    rundir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "REPLY_SECONDS", 0.05)
    with pytest.raises(Unavailable, match="still starting"):
        command.reload(Terminal(), "c", file(tmp_path))


async def test_an_answer_that_cannot_be_written_ends_no_cluster(
    rundir: RunDir, tmp_path: Path
) -> None:
    (rundir.path / "reload.new").mkdir()  # as a full disk: the file cannot be made
    given = file(tmp_path, targets={"ttft_seconds": 1})
    cluster = RunningCluster(rundir)
    (rundir.path / "reload.request").write_text(json.dumps({"id": "x", "file": str(given)}))
    await Reloads(cluster, rundir, Config.load).answer()  # type: ignore[arg-type]
    assert cluster.taken and not (rundir.path / "reload.reply").exists()
    with pytest.raises(Unavailable, match=r"reload\.request cannot be written: Is a directory"):
        command.reload(Terminal(), "c", given)
