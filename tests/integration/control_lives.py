"""A real Ray, a real Valkey and bodies without engines: start, kill, restart, shutdown."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import Config
from cluster.control.launch import Launch
from cluster.control.status import ClusterStatus
from cluster.store.client import connect
from cluster.store.embedded import EmbeddedStore
from cluster.store.registry import Registry

pytestmark = pytest.mark.slow


@pytest.fixture
async def controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Any, EmbeddedStore]]:
    from cluster.control.runtime import RayRuntime

    bodies = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(bodies), *filter(None, sys.path)]))
    config = actor_config()
    store = EmbeddedStore.start(tmp_path)
    runtime = RayRuntime(config, tmp_path)
    try:
        await runtime.start()
        launch = Launch(
            config,
            b"s" * 32,
            store.url,
            tmp_path / "logs",
            worker_body="control_bodies:Worker",
            router_body="control_bodies:Router",
        )
        yield await runtime.start_controller(launch), store
    finally:
        await runtime.stop()
        runtime.remove_files()
        store.stop()


def actor_config() -> Config:
    return Config.model_validate({"name": "lives", "models": [{"name": "m", "path": "/m"}]})


def with_prefill(config: Config, replicas: int) -> Config:
    (model,) = config.models
    pool = model.prefill.model_copy(update={"replicas": replicas})
    return config.model_copy(update={"models": [model.model_copy(update={"prefill": pool})]})


async def until_ready(controller: Any) -> ClusterStatus:
    async with asyncio.timeout(60):
        while True:
            status: ClusterStatus = await controller.status.remote()
            assert not status.failed
            if status.ready:
                return status
            await asyncio.sleep(0.1)


async def until(controller: Any, true: Callable[[ClusterStatus], bool]) -> ClusterStatus:
    async with asyncio.timeout(30):
        while True:
            status: ClusterStatus = await controller.status.remote()
            if true(status):
                return status
            await asyncio.sleep(0.1)


async def test_lives_end_and_begin_as_they_should(
    controller: tuple[Any, EmbeddedStore],
) -> None:
    import ray

    actor, store = controller
    first = await until_ready(actor)
    assert [s.slot_id for s in first.slots] == ["m-decode-0", "m-prefill-0", "router-0"]
    victim = psutil.Process(first.slots[0].pid)
    children = victim.children()
    assert children
    victim.kill()

    second = first
    async with asyncio.timeout(30):
        while second.slots[0].incarnation == first.slots[0].incarnation:
            second = await until_ready(actor)
    assert second.slots[1].incarnation == first.slots[1].incarnation  # the other lived on
    client = await connect(store.url, 30.0)
    registry = Registry(client, "lives")
    assert {w.incarnation for w in await registry.workers()} == {
        slot.incarnation for slot in second.slots[:2]
    }
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive  # the engine of the killed worker went with it

    two = with_prefill(actor_config(), replicas=2)
    await actor.reload.remote(two)
    slots = (await until_ready(actor)).slots
    assert [s.slot_id for s in slots] == [
        "m-decode-0", "m-prefill-0", "m-prefill-1", "router-0"]  # fmt: skip
    assert {s.incarnation for s in second.slots} < {s.incarnation for s in slots}
    await actor.reload.remote(with_prefill(two, replicas=1))
    third = await until(actor, lambda status: len(status.slots) == 3 and status.ready)
    assert [s.incarnation for s in third.slots] == [s.incarnation for s in second.slots]

    last = [child for s in third.slots[:2] for child in psutil.Process(s.pid).children()]
    node_id = ray.get_runtime_context().get_node_id()
    assert sorted(await actor.leave.remote(node_id, 1.0)) == [s.slot_id for s in third.slots]
    assert await registry.workers() == []
    empty = await until(actor, lambda status: len(status.failed) == 3)
    assert all("no host is there but those that leave" in s.detail for s in empty.slots)
    await actor.shutdown.remote(1.0)
    assert await registry.workers() == [] and await registry.routers() == []
    await client.aclose()
    _, alive = psutil.wait_procs(last, timeout=10)
    assert not alive
