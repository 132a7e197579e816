"""A life that ends in an unusual way is an end like others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.control import actors, fleet
from cluster.control.actors import Failure, RouterActor
from cluster.control.fleet import need_of
from cluster.control.launch import Launch
from cluster.control.reconcile import Slot
from router.server import RouterServer

SLOT = Slot("router", "router-0")


def launch(path: Path) -> Launch:
    config = Config.model_validate({"name": "c", "models": [{"name": "m", "path": "/m"}]})
    return Launch(config, b"s" * 32, "", path)


class Group:
    """A placement group that is ready."""

    bundle_count = 1

    async def ready(self) -> None:
        pass


async def end_of(monkeypatch: pytest.MonkeyPatch, path: Path, error: Exception) -> fleet.End:
    class Remote:
        def options(self, **given: Any) -> Remote:
            return self

        def remote(self, *given: Any) -> Any:
            raise error

    monkeypatch.setattr(fleet, "NAME_SECONDS", 0.05)
    monkeypatch.setattr(fleet, "placement_group", lambda *_, **__: Group())
    monkeypatch.setattr(fleet, "remove_placement_group", lambda _: None)
    monkeypatch.setattr(fleet, "PlacementGroupSchedulingStrategy", lambda group: group)
    table = {"bundles_to_node_id": {0: "node"}}
    monkeypatch.setattr(fleet, "placement_group_table", lambda _: table)
    monkeypatch.setattr(fleet.ray, "remote", lambda kind: Remote())
    return await fleet.RayLife(launch(path), SLOT, "x", "n", need_of(SLOT, False)).ended


async def test_a_name_that_is_not_freed_ends_the_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    end = await end_of(monkeypatch, tmp_path, ValueError("the name is taken"))
    assert not end.permanent
    assert "name was not free within" in end.reason


async def test_whatever_ray_raises_ends_the_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    end = await end_of(monkeypatch, tmp_path, KeyError("something new"))
    assert "KeyError" in end.reason and "something new" in end.reason


class Body:
    """A router that does nothing."""

    def __init__(self, **given: Any) -> None:
        self.broken = asyncio.Event()
        self.drained = asyncio.Event()

    async def start(self) -> None:
        pass

    async def stop(self, drain_seconds: float) -> None:
        await self.drained.wait()


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RouterActor:
    for name in ("redirect_output", "become_subreaper", "_setup_logging", "kill_descendants"):
        monkeypatch.setattr(actors, name, lambda *_: None)
    monkeypatch.setattr(actors, "_load", lambda _: Body)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return RouterActor(launch(tmp_path), SLOT, "x")


async def started(actor: RouterActor) -> asyncio.Task[Failure | None]:
    running = asyncio.create_task(actor.run())
    await asyncio.sleep(0.01)
    assert not running.done()
    return running


async def test_a_broken_router_ends_its_life(actor: RouterActor) -> None:
    running = await started(actor)
    actor._body.broken.set()
    failure = await asyncio.wait_for(running, 30)
    assert failure is not None and "router broke" in failure.reason and not failure.permanent


async def test_a_router_that_breaks_while_it_drains_is_stopped_in_order(
    actor: RouterActor,
) -> None:
    running = await started(actor)
    stopping = asyncio.create_task(actor.stop(1))
    await asyncio.sleep(0)
    actor._body.broken.set()
    await asyncio.sleep(0.01)
    assert not running.done()
    actor._body.drained.set()
    assert await asyncio.wait_for(running, 30) is None
    await stopping


async def test_a_router_whose_background_died_says_so(tmp_path: Path) -> None:
    server = RouterServer(launch(tmp_path).config, "router-0", "x", b"s" * 32, "")

    async def die() -> None:
        raise RuntimeError("a bug")

    server._background.start({"a part": die})
    await asyncio.wait_for(server.broken.wait(), 5)


async def test_what_a_controller_left_goes_and_no_other_clusters_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []

    def make(*_: Any, name: str, **__: Any) -> Group:
        made.append(name)
        return Group()

    def find(name: str) -> str:
        if name == made[2]:
            raise ValueError("no such group in this namespace")
        return name

    removed: list[str] = []
    table: dict[int, dict[str, str]] = {}
    monkeypatch.setattr(fleet, "placement_group", make)
    monkeypatch.setattr(fleet, "remove_placement_group", lambda _: None)
    monkeypatch.setattr(fleet, "placement_group_table", lambda *_: table)
    for cluster, slot in (("prod", "router-0"), ("prod-eu", "router-0"), ("prod", "router-1")):
        config = Config.model_validate({"name": cluster, "models": [{"name": "m", "path": "/m"}]})
        place = replace(SLOT, slot_id=slot)
        life = Launch(config, b"s" * 32, "", tmp_path)
        running = fleet.RayLife(life, place, "x", "n", need_of(SLOT, False))
        await running.ended
    table.update({i: {"name": name, "state": "CREATED"} for i, name in enumerate(made)})
    monkeypatch.setattr(fleet, "get_placement_group", find)
    monkeypatch.setattr(fleet, "remove_placement_group", removed.append)
    fleet.drop_former_groups("prod")
    assert removed == [made[0]]
