"""A real Ray, a real Valkey and bodies without engines: start, kill, restart, shutdown."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
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
    config = Config.model_validate({"name": "lives", "models": [{"name": "m", "path": "/m"}]})
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


async def until_ready(controller: Any) -> ClusterStatus:
    async with asyncio.timeout(60):
        while True:
            status: ClusterStatus = await controller.status.remote()
            assert not status.failed
            if status.ready:
                return status
            await asyncio.sleep(0.1)


async def test_a_killed_worker_comes_back_as_another_life_and_shutdown_leaves_nothing(
    controller: tuple[Any, EmbeddedStore],
) -> None:
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
    client = await connect(store.url, 2.0)
    registry = Registry(client, "lives")
    assert {w.incarnation for w in await registry.workers()} == {
        slot.incarnation for slot in second.slots[:2]
    }
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive  # the engine of the killed worker went with it

    last = [child for s in second.slots[:2] for child in psutil.Process(s.pid).children()]
    await actor.shutdown.remote(1.0)
    assert await registry.workers() == [] and await registry.routers() == []
    await client.aclose()
    _, alive = psutil.wait_procs(last, timeout=10)
    assert not alive


async def test_a_host_that_leaves_is_drained_and_left_empty(
    controller: tuple[Any, EmbeddedStore],
) -> None:
    import ray

    actor, store = controller
    first = await until_ready(actor)
    node_id = ray.get_runtime_context().get_node_id()
    assert sorted(await actor.leave.remote(node_id, 1.0)) == [s.slot_id for s in first.slots]
    client = await connect(store.url, 2.0)
    assert await Registry(client, "lives").workers() == []
    await client.aclose()
    async with asyncio.timeout(30):
        while True:
            status: ClusterStatus = await actor.status.remote()
            if all(slot.state == "failed" for slot in status.slots):
                break
            await asyncio.sleep(0.1)
    assert all("no host has the labels ray.io/node-id=!in(" in s.detail for s in status.slots)
