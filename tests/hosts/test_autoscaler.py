"""A pool outgrows its hosts: Ray's autoscaler sees what waits, a node comes, the worker serves.

Simulated engines under the real controller, planner and router; Ray's real autoscaler (v2) with its
fake provider, which adds one node at most. The tests run in this order, on one cluster.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import yaml

from cluster.store.records import WorkerRecord
from tests.cluster.running import MODEL, RunningCluster, registered
from tests.cluster.test_planner_acts import SEED, VOCAB, Load
from tests.hosts.conftest import Ground
from tests.hosts.ray_cluster import RAY


def settings(ground: Ground, workers: int) -> str:
    """A decode worker takes all the room of a host; the planner may have so many workers."""
    simulation = {"step_seconds": 0.02, "prefill_token_seconds": 1e-4, "prefill_pair_seconds": 0,
                  "decode_sequence_seconds": 1e-3, "decode_token_seconds": 0,
                  "vocab_size": VOCAB, "seed": SEED}  # fmt: skip
    model = {
        "name": "m",
        "path": str(MODEL),
        "engine": "simulated",
        "max_model_len": 8000,
        "simulation": simulation,
        "prefill": {"resources": {"head": 1}, "num_gpus": 0},
        "decode": {"resources": {"room": 1}, "num_gpus": 0},
    }
    return yaml.safe_dump(
        {
            "name": "grows",
            "models": [model],
            "router": {"grpc_port": 0, "http_port": 0, "operator_port": 0,
                       "pool": {"resources": {"head": 1}}},
            "placement": {"disaggregate": "always"},
            "classes": {"interactive": {"ttft_seconds": 1.5, "tpot_seconds": 0.033}},
            "lifecycle": {"drain_timeout_seconds": 10},
            "planner": {"mode": "act", "interval_seconds": 0.5, "cold_start_seconds": 40,
                        "budget": [{"name": "hosts", "gpus": workers}]},
            "ray": {"address": ground.ray.address},
            "store": {"url": ground.store_url},
        }
    )  # fmt: skip


@dataclass
class Growing:
    ground: Ground
    cluster: RunningCluster

    def decode(self) -> dict[str, WorkerRecord]:
        """The ready decode workers."""
        workers = registered(self.cluster).values()
        return {w.worker_id: w for w in workers if w.role == "decode" and w.state == "ready"}

    def waiting(self) -> dict[str, str]:
        """What each worker waits for, as `pdserve status` tells."""
        view = json.loads(self.cluster.pdserve("status", "--json").stdout)
        return {w["worker_id"]: w["detail"] for w in view["workers"] if w["state"] == "waiting"}

    def ray_status(self) -> str:
        ray = self.ground.ray
        return ray.run(RAY, "status", "--address", ray.address)

    def ordered(self, *args: str) -> str:
        done = self.cluster.pdserve(*args)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def growing(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Growing]:
    folder, ray = tmp_path_factory.mktemp("grows"), ground.ray
    cluster = RunningCluster(folder, "grows", settings(ground, 3), within=ray.head.within)
    cluster.env = {**ray.env, "PDSERVE_RUNTIME_DIR": str(folder / "run")}
    cluster.start()
    yield Growing(ground, cluster)
    code, left = cluster.stop()
    assert (code, left) == (0, [])


def until(true: Callable[[], Any], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


def served(growing: Growing, rate: float, over: Callable[[], bool], least: float) -> int:
    """Puts load on the cluster, every answer checked to the last token; how many there were."""

    async def load() -> int:
        async with grpc.aio.insecure_channel(growing.cluster.grpc_address) as channel:
            load = Load(channel)
            await load.run(rate, 40, 130, over, least)
            return load.ended

    return asyncio.run(load())


def test_the_planner_adds_a_worker_and_rays_autoscaler_its_node(growing: Growing) -> None:
    assert set(growing.decode()) == {"m-decode-0"}
    deadline = time.monotonic() + 120
    with ThreadPoolExecutor(1) as beside:
        looks = [beside.submit(growing.decode)]

        def both_serve() -> bool:
            assert time.monotonic() < deadline, growing.cluster.log.read_text()[-2000:]
            if not looks[-1].done():
                return False
            there = looks[-1].result()
            looks.append(beside.submit(growing.decode))
            return set(there) == {"m-decode-0", "m-decode-1"}

        assert served(growing, 5.0, both_serve, 3.0) > 15
    assert "m-decode-1: waiting for 1 room" in growing.cluster.log.read_text()
    decisions = json.loads(growing.ordered("explain", "--limit", "200", "--json"))
    (added,) = [d for d in decisions if d["actions"] and d["acted"]]
    assert added["source"] == "planner" and added["reasons"]
    assert [(a["kind"], a["worker_id"]) for a in added["actions"]] == [("add", "m-decode-1")]
    until(lambda: " 1 spare\n" in growing.ray_status(), 30, growing.ray_status)


def test_what_no_node_can_take_is_pending_until_a_host_joins(growing: Growing) -> None:
    refused = growing.cluster.pdserve("scale", "decode", "3")
    assert refused.returncode == 1 and "over planner.budget" in refused.stderr
    growing.cluster.file.write_text(settings(growing.ground, 4))
    assert "budget.hosts.gpus: 3 → 4" in growing.ordered("reload", "-f", str(growing.cluster.file))
    growing.ordered("scale", "decode", "3")
    until(growing.waiting, 30, growing.cluster.log.read_text)
    assert growing.waiting() == {"m-decode-2": "for 1 room"}
    pending = "'room': 1.0"
    until(
        lambda: pending in growing.ray_status().partition("Pending Demands:")[2],
        30,
        growing.ray_status,
    )
    assert "pending placement group" in growing.ray_status()
    assert len(growing.decode()) == 2

    host = growing.ground.network.add()
    growing.ground.ray.join(host, room=1)
    until(lambda: "m-decode-2" in growing.decode(), 90, growing.cluster.log.read_text)
    assert growing.decode()["m-decode-2"].address.startswith(f"{host.address}:")
    assert growing.waiting() == {}
    done = (
        growing.cluster.pdserve("drain", "m-decode-0"),
        growing.cluster.pdserve("drain", "m-decode-1"),
    )  # all that is served now is served on the new host
    assert [each.returncode for each in done] == [0, 0]
    until(lambda: set(growing.decode()) == {"m-decode-2"}, 60, growing.cluster.log.read_text)
    assert served(growing, 5.0, lambda: True, 1.0) > 0
    growing.cluster.wait_idle()


def test_a_node_that_nothing_needs_goes_again(growing: Growing) -> None:
    until(lambda: " 1 spare\n" not in growing.ray_status(), 60, growing.ray_status)
    assert set(growing.decode()) == {"m-decode-2"}
