"""The controller's body without Ray: configurations reloaded, hosts that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.control import controller as module
from cluster.control.controller import Controller
from cluster.control.fleet import End
from cluster.control.hosts import NODE_ID, Host, Need
from cluster.control.launch import Launch
from cluster.control.reconcile import Slot
from cluster.control.status import ClusterStatus
from cluster.store.records import RouterRecord, WorkerRecord
from cluster.store.registry import Members

NODES = {"a": Host("a", "10.0.0.1", {"CPU": 2}, {NODE_ID: "a"}),
         "b": Host("b", "10.0.0.2", {"CPU": 2}, {NODE_ID: "b"})}  # fmt: skip
LIVES: dict[str, FakeLife] = {}


class FakeLife:
    """Is placed and ready at once, on the node it aims at."""

    where = None
    lacks = ""

    def __init__(
        self, launch: Launch, slot: Slot, incarnation: str, namespace: str, need: Need, aim: str
    ) -> None:
        self.slot, self.incarnation, self.need, self.aim = slot, incarnation, need, aim
        self.node_id = aim
        self.drained: float | None = None
        self.config = launch.config
        self.ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        LIVES[slot.slot_id] = self

    def waits_for(self) -> str:
        return "" if self.node_id else "for a host"

    async def reload(self, config: Config) -> None:
        self.config = config

    async def stop(self, drain_seconds: float) -> None:
        self.drained = drain_seconds
        await self.kill()

    async def kill(self) -> None:
        if LIVES.get(self.slot.slot_id) is self:
            del LIVES[self.slot.slot_id]


class FakeRegistry:
    def __init__(self, *_: object) -> None:
        pass

    async def members(self) -> Members:
        lives = [life for life in LIVES.values() if life.node_id]
        workers = tuple(
            WorkerRecord(v.slot.slot_id, v.incarnation, v.slot.model, v.slot.role, "ready")
            for v in lives
            if v.slot.kind == "worker"
        )
        routers = tuple(
            RouterRecord(v.slot.slot_id, v.incarnation, "h:1", "h:2")
            for v in lives
            if v.slot.kind == "router"
        )
        return Members(workers, routers)

    async def remove_worker(self, *_: str) -> bool:
        return True

    remove_router = remove_worker


def config(prefill: int = 1, ttft: float = 2.0) -> Config:
    model = {"name": "m", "path": "/m", "prefill": {"replicas": prefill}}
    return Config.model_validate({"models": [model], "targets": {"ttft_seconds": ttft}})


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Controller:
    async def connect(*_: object) -> None:
        return None

    LIVES.clear()
    for name, fake in {
        "RayLife": FakeLife,
        "Registry": FakeRegistry,
        "connect": connect,
        "hosts": lambda: list(NODES.values()),
        "any_gpus": lambda: False,
        "drop_former_groups": lambda _: None,
        "redirect_output": lambda _: None,
        "INTERVAL_SECONDS": 0.01,
    }.items():
        monkeypatch.setattr(module, name, fake)
    launch = Launch(config(), b"s" * 32, "", tmp_path, embedded=False)
    return Controller(launch, "n")


async def until(controller: Controller, true: Callable[[ClusterStatus], Any]) -> ClusterStatus:
    async with asyncio.timeout(5):
        while True:
            status = await controller.status()
            if true(status):
                return status
            await asyncio.sleep(0.01)


async def test_a_pool_that_grows_and_shrinks_leaves_the_others_alone(
    controller: Controller,
) -> None:
    await until(controller, lambda s: s.ready)
    first = dict(LIVES)
    await controller.reload(config(prefill=2, ttft=1.0))
    await until(controller, lambda s: s.ready and len(s.slots) == 4)
    assert all(LIVES[slot_id] is life for slot_id, life in first.items())
    assert first["router-0"].config.targets.ttft_seconds == 1.0
    added = LIVES["m-prefill-1"]
    await controller.reload(config(prefill=1))
    await until(controller, lambda s: s.ready and len(s.slots) == 3)
    assert added.drained == config().lifecycle.drain_timeout_seconds
    assert dict(LIVES) == first


async def test_a_host_that_leaves_is_drained_and_its_lives_go_elsewhere(
    controller: Controller,
) -> None:
    await until(controller, lambda s: s.ready)
    here = {slot_id for slot_id, life in LIVES.items() if life.node_id == "a"}
    stay = {slot_id: life for slot_id, life in LIVES.items() if life.node_id == "b"}
    assert here and stay
    gone = [LIVES[slot_id] for slot_id in here]
    assert set(await controller.leave("a", 7.0)) == here
    assert {life.drained for life in gone} == {7.0}
    await until(controller, lambda s: s.ready)
    assert {life.node_id for life in LIVES.values()} == {"b"}
    assert all(LIVES[slot_id] is life for slot_id, life in stay.items())
    assert all(LIVES[slot_id].need.labels[NODE_ID] == "!in(a)" for slot_id in here)


async def test_what_no_host_can_take_is_said_and_waits(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hosts", list)
    status = await until(controller, lambda s: any(life.lacks for life in LIVES.values()))
    assert {slot.state for slot in status.slots} == {"waiting"}
    assert {life.lacks for life in LIVES.values()} == {"there is no host"}
    monkeypatch.setattr(module, "hosts", lambda: list(NODES.values()))
    for life in LIVES.values():
        life.node_id = "a"
    await until(controller, lambda s: s.ready)
