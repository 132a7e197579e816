"""A runtime directory that cannot be written, as on a full disk, while a cluster serves."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.cli import launch
from cluster.cli.launch import Cluster
from cluster.cli.progress import Progress
from cluster.cli.rundir import RunDir
from cluster.config import Config
from cluster.control.status import ClusterStatus, SlotStatus
from cluster.errors import Unavailable


class Controller:
    """As many of the controller's calls as are made here; a router's life has moved."""

    def __init__(self) -> None:
        self.drains: list[float] = []
        for call in ("status", "shutdown", "reload"):
            setattr(self, call, SimpleNamespace(remote=getattr(self, f"_{call}")))

    async def _status(self) -> ClusterStatus:
        router = SlotStatus(
            "router-0", "router", "", "ready", 1.0, grpc_address="h:9", http_address="h:8"
        )
        return ClusterStatus(store_reachable=True, stopping=False, slots=(router,))

    async def _shutdown(self, drain_seconds: float) -> None:
        self.drains.append(drain_seconds)

    async def _reload(self, _: Config) -> list[str]:
        return []


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controller: Controller, said: io.StringIO
) -> Cluster:
    """One that serves, and whose state cannot be published any more."""
    monkeypatch.setenv("PDSERVE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "kill_descendants", list)
    rundir = RunDir("c")
    rundir.acquire()
    config = Config.model_validate({"name": "c", "models": [{"name": "m", "path": "p"}]})
    served = Cluster(config, rundir, Progress(Console(file=said, width=200)))
    inside: Any = served
    inside._controller, inside._routed = controller, ("h:1", "h:2", "")
    for name in ("state.new", "config.new"):
        (rundir.path / name).mkdir()
    return served


async def test_it_serves_on_when_a_router_moves(cluster: Cluster, said: io.StringIO) -> None:
    assert (await cluster.status()).ready
    await cluster.status()
    assert said.getvalue().count("state.json cannot be written: Is a directory") == 1


async def test_it_drains_when_it_is_ended(cluster: Cluster, controller: Controller) -> None:
    await cluster.stop(drain_seconds=7)
    assert controller.drains == [7]


async def test_what_was_reloaded_is_said_to_be(cluster: Cluster) -> None:
    config = cluster.config.model_copy(update={"name": "c"})
    (complaint,) = await cluster.reload(config)
    assert "config.json cannot be written" in complaint and "config diff" in complaint
    assert cluster.config is config


async def test_a_start_says_which_file(cluster: Cluster) -> None:
    with pytest.raises(Unavailable, match=r"state\.json cannot be written"):
        await cluster.start()
