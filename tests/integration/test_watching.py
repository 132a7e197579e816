"""`pdserve bench` and `pdserve top` as a user runs them, against a cluster of simulated engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from cluster.cli import status, top_looks
from cluster.cli.access import channel
from cluster.cli.calls import cluster_view
from cluster.cli.terminal import Terminal
from cluster.cli.timeline import PHASES
from cluster.cli.top_looks import Watcher
from cluster.errors import Unavailable
from cluster.store.records import RouterRecord
from cluster.store.registry import Registry
from tests.integration.certificates import make_certificates
from tests.integration.simulated import MODEL, SimulatedCluster, config, simulated_cluster
from tests.integration.test_router_grpc import TIMEOUT, ask
from tests.integration.test_router_resume import Pair, pair, store  # noqa: F401

ROLES = {"p-0": "prefill", "d-0": "decode"}
TOKEN = "token-of-the-only-tenant"


async def started(*args: str, **env: str) -> asyncio.subprocess.Process:
    code = "from cluster.cli.entry import main; main()"
    path = os.pathsep.join(filter(None, sys.path))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *args,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "80", **env},
    )  # fmt: skip


async def ended(process: asyncio.subprocess.Process) -> tuple[str, str]:
    out, err = await asyncio.wait_for(process.communicate(), 240)
    return out.decode(), err.decode()


async def served(cluster: SimulatedCluster) -> int:
    async with channel(cluster.router.grpc_address) as to:
        (router,) = (await cluster_view(to, router_only=True)).routers
    assert router.lately is not None
    return router.lately.requests


async def test_a_load_is_measured_watched_and_interrupted(tmp_path: Path) -> None:
    split = config(placement={"disaggregate": "always"})
    trace = tmp_path / "trace.jsonl"
    lines = [{"at": i / 20, "prompt": 150, "output": 5, "blocks": [7, i], "block_tokens": 64}
             for i in range(12)]  # fmt: skip
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    async with simulated_cluster(tmp_path, ROLES, split) as cluster:
        at = ("--address", cluster.router.grpc_address)
        replay = await started(
            "bench", *at, "--trace", str(trace), "--slo", "ttft=60,tpot=60", "--json"
        )
        out, err = await ended(replay)
        assert replay.returncode == 0, err
        report = json.loads(out)
        (run,) = report["runs"]
        assert report["model"] == MODEL
        assert run["requests"]["offered"] == run["requests"]["ok"] == 12
        assert (run["attained"], run["attainment"], run["split_requests"]) == (12, 1.0, 12)
        assert run["prompt_tokens_per_second"] * run["seconds"] == pytest.approx(12 * 150)
        assert run["output_tokens_per_second"] * run["seconds"] == pytest.approx(12 * 5)
        assert run["cached_prompt_share"] > 0  # a block of 64 that all begin with
        assert set(run["phase_seconds"]) == set(PHASES) and run["phase_seconds"]["decode"] > 0
        for name in ("ttft", "tpot", "client_ttft", "itl", "e2e"):
            assert 0 <= run[f"{name}_seconds"]["p50"] <= run[f"{name}_seconds"]["p99"]
        assert await served(cluster) == 12

        load = await started("bench", *at, "--concurrency", "3", "--warm-up", "0", "--seconds=600")
        while await served(cluster) < 20 and load.returncode is None:  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.05)
        top = await started("top", *at, "--once", "--json")
        out, err = await ended(top)
        assert top.returncode == 0, err
        (line,) = out.splitlines()
        shown = json.loads(line)
        assert [(p["role"], p["ready"]) for p in shown["pools"]] == [("prefill", 1), ("decode", 1)]
        prefill, decode = shown["pools"]
        assert prefill["prompt_tokens_per_second"] > 0 == decode["prompt_tokens_per_second"]
        assert decode["output_tokens_per_second"] > 0
        assert shown["attainment_of_requests"] >= 20
        (router,) = shown["routers"]
        assert router["running_requests"] > 0 and router["lately"]["ttft_seconds"]["p50"] > 0
        load.send_signal(signal.SIGINT)
        out, err = await ended(load)
        assert (load.returncode, "Traceback" in err) == (130, False)
        assert "interrupted after" in out and "0 refused, 0 failed" in out
        assert "3 under way were cut off" in out


async def test_credentials_tls_and_refusals(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    tenant = {
        "name": "only",
        "token_file": str(tmp_path / "token"),
        "limits": {"requests_per_second": 0.01, "burst_seconds": 300},
    }
    tls = {"cert_file": str(tmp_path / "server.crt"), "key_file": str(tmp_path / "server.key")}
    settings = config(router={"tls": tls}, tenants=[tenant])
    ca = str(tmp_path / "ca.crt")
    async with simulated_cluster(tmp_path / "store", ROLES, settings) as cluster:
        at = f"127.0.0.1:1,{cluster.router.grpc_address}"  # the first is dead
        small = (
            "bench", "--address", at, "--concurrency=1", "--warm-up=0", "--prompt-tokens=16-32",
            "--output-tokens=2", "--json",
        )  # fmt: skip
        shown = {"PDSERVE_CA_FILE": ca, "PDSERVE_TOKEN": TOKEN}
        bench = await started(*small, "--requests=4", "--may-fail=0.25", **shown)
        wrong = await started(
            "bench", "--address", cluster.router.grpc_address,
            PDSERVE_CA_FILE=ca, PDSERVE_TOKEN="another",
        )  # fmt: skip
        out, err = await ended(bench)
        assert bench.returncode == 0, err
        (run,) = json.loads(out)["runs"]
        counts = {name: run["requests"][name] for name in ("offered", "ok", "refused", "failed")}
        assert counts == {"offered": 4, "ok": 3, "refused": 1, "failed": 0}
        (reason,) = run["reasons"]
        assert reason["end"] == "refused" and "requests per second" in reason["reason"]
        assert run["targets_seconds"] is None  # they are the operator's to tell
        none_left = await started(*small, "--requests=1", **shown)
        out, err = await ended(none_left)
        assert (none_left.returncode, "no request was served" in err) == (1, True)
        assert json.loads(out)["runs"][0]["requests"]["refused"] == 1
        _, err = await ended(wrong)
        assert (wrong.returncode, "PDSERVE_TOKEN" in err) == (1, True)


async def test_status_asks_each_router_what_it_runs(
    pair: Pair,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one that cannot be asked nobody knows what it runs, which is not 0."""
    gone = RouterRecord("r-gone", "life", "127.0.0.1:1", "127.0.0.1:1")
    await Registry(pair.client, pair.config.name).put_router(gone, lease_seconds=600)
    pair.fakes.decode.gate.clear()
    calls = [pair.stub(1).Generate(ask(), timeout=TIMEOUT) for _ in range(3)]
    for call in calls:
        await call.read()
    address = pair.routers[0].grpc_address
    assert await asyncio.to_thread(status.run, Terminal(), address, as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)["routers"]
    routers = {router["router_id"]: router for router in shown}
    running = {router_id: router["running_requests"] for router_id, router in routers.items()}
    assert running == {"r-0": 0, "r-1": 3, "r-gone": None}
    assert [bool(routers[r]["silent"]) for r in running] == [r == "r-gone" for r in running]
    assert await asyncio.to_thread(status.run, Terminal(), address, as_json=False) == 0
    said = capsys.readouterr().out
    cells = [line.split() for line in said.splitlines()]
    assert {row[0]: row[-1] for row in cells if len(row) == 4 and row[0] in running} == {
        "r-0": "0", "r-1": "3", "r-gone": "–",
    }  # fmt: skip
    assert "r-gone does not answer: no router" in said
    pair.fakes.decode.gate.set()


async def test_top_goes_on_with_another_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that it was told of has gone, and it knows the other one from before."""
    monkeypatch.setattr(top_looks, "LOOK_SECONDS", 2.0)
    async with simulated_cluster(tmp_path, ROLES, config()) as cluster:
        watcher = Watcher("127.0.0.1:1", "")
        async with watcher:
            with pytest.raises(Unavailable):
                await watcher.look()
            watcher._known.append(cluster.router.grpc_address)
            look = await watcher.look()
            assert [w.worker_id for w in look.view.workers] == ["d-0", "p-0"]
            assert watcher._known[0] == cluster.router.grpc_address
