"""Operators at a router: who may steer, what is written down, what a calibration run measures."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import grpc
import pytest

from cluster.cli import plan_calls, profile, profile_requests, record
from cluster.cli.access import channel
from cluster.cli.calls import cluster_view
from cluster.cli.steer import Steering
from cluster.cli.terminal import Terminal
from cluster.config import Config
from cluster.control.speeds import speed_of
from cluster.engine.simulated.timing import Timing
from cluster.errors import InvalidRequest, Unauthenticated, Unavailable
from cluster.planner.calibrate import calibrate
from cluster.planner.hardware import hardware
from cluster.planner.profile import Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.simulator.traces import read_trace
from cluster.store.client import connect
from cluster.store.plan_records import DecisionRecord, ModelPlan, Order, PlanView, Reply
from cluster.store.plans import Plans
from cluster.ticket import TicketSigner
from tests.integration.simulated import SECRET, SimulatedCluster, answer, config, simulated_cluster

TOKEN = TicketSigner(SECRET).call_token()
ROLES = {"p-0": "prefill", "d-0": "decode"}


async def plans_of(cluster: SimulatedCluster) -> Plans:
    return Plans(await connect(cluster.store.url, 30.0), cluster.config.name)


async def test_steering_needs_the_operators_credentials_and_reaches_the_controller(
    tmp_path: Path,
) -> None:
    async with simulated_cluster(tmp_path, ROLES, config()) as cluster:
        plans = await plans_of(cluster)

        async def controller() -> list[Order]:
            taken: list[Order] = []
            while len(taken) < 7:
                if (order := await plans.next_order()) is not None:
                    taken.append(order[1])
                    await plans.answer(order[0], Reply(f"{order[1].kind} done"))
                await asyncio.sleep(0.01)
            return taken

        answering = asyncio.create_task(controller())
        async with channel(cluster.router.grpc_address) as stranger:
            for call in (
                plan_calls.scale(stranger, "", "decode", 2),
                plan_calls.flip(stranger, "d-0", "prefill"),
                plan_calls.drain(stranger, "d-0"),
                plan_calls.release_everything(stranger),
                plan_calls.set_targets(stranger, "batch", 1, 0),
            ):
                with pytest.raises(Unauthenticated, match="operator's credentials"):
                    await call
            with pytest.raises(Unauthenticated):
                _ = [seen async for seen in plan_calls.requests_seen(stranger, 60, False, 5)]
        async with channel(cluster.router.grpc_address, TOKEN) as to:
            assert await plan_calls.scale(to, "", "decode", 2) == "scale done"
            await plan_calls.flip(to, "d-0", "prefill")
            await plan_calls.drain(to, "d-0")
            await plan_calls.set_targets(to, "batch", 1.5, 0)
            await plan_calls.release_worker(to, "d-0")
            await plan_calls.release_pool(to, "made-up", "decode")
            await plan_calls.release_targets(to)
            assert await answering == [
                Order("scale", model="made-up", role="decode", workers=2),
                Order("flip", worker_id="d-0", role="prefill"),
                Order("drain", worker_id="d-0"),
                Order("targets", slo_class="batch", ttft_seconds=1.5),
                Order("release", worker_id="d-0"),
                Order("release", model="made-up", role="decode"),
                Order("release", slo_class="all"),
            ]
            with pytest.raises(InvalidRequest, match="they are made-up"):
                await plan_calls.decisions(to, "other", 5)


async def test_the_plan_is_shown_and_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with simulated_cluster(tmp_path, ROLES, config()) as cluster:
        plans, terminal = await plans_of(cluster), Terminal()
        steering = Steering(terminal, cluster.router.grpc_address, TOKEN, as_json=False)
        assert await asyncio.to_thread(steering.recommend) == 1
        decision = DecisionRecord(
            3, 10.0, "made-up", "planner", False, {"prefill": 1}, {"decode": 2}, {}, (), "",
            ("expected: much",), (), {"rate_expected": 2.0},
        )  # fmt: skip
        await plans.log(decision)
        one = {"prefill": 1}
        plan = ModelPlan("made-up", one, one, {"decode": 2}, ("d-9",), {}, {"batch": 0.5},
                         {"decode": 0.04}, {"flips": 2}, "data sheet", decision)  # fmt: skip
        await plans.publish(PlanView(20.0, "recommend", (plan,)))
        assert await asyncio.to_thread(steering.recommend) == 0
        assert await asyncio.to_thread(steering.explain_plan, "", 5) == 0
        said = capsys.readouterr().out
        for part in ("drained: d-9", "batch: 50.0%", "decode ±4%", "1 prefill → 2 decode",
                     "(recommended)", "expected: much"):  # fmt: skip
            assert part in said
        await cluster.generate([1, 2, 3], max_tokens=2)
        assert await asyncio.to_thread(steering.explain_request, cluster.last_id) == 0
        assert "observed: TTFT" in capsys.readouterr().out
        in_json = Steering(terminal, cluster.router.grpc_address, TOKEN, as_json=True)
        await asyncio.to_thread(in_json.recommend)
        shown = json.loads(capsys.readouterr().out)
        assert shown["models"][0]["done"] == {"flips": 2}
        assert shown["models"][0]["decision"]["number"] == 3
        metrics = cluster.router.metrics.registry
        async with asyncio.timeout(30):
            while metrics.get_sample_value(  # noqa: ASYNC110 - read by its own task
                "pdserve_plan_actions_total", {"model": "made-up", "kind": "flips"}
            ) != 2:  # fmt: skip
                await asyncio.sleep(0.1)
        labels = {"model": "made-up", "role": "decode", "count": "manual"}
        assert metrics.get_sample_value("pdserve_plan_workers", labels) == 2


async def test_requests_are_recorded_without_their_text(tmp_path: Path) -> None:
    rng = random.Random(6)
    async with simulated_cluster(tmp_path, ROLES, config()) as cluster:
        shared = [rng.randrange(800) for _ in range(256)]
        prompts = [shared + [rng.randrange(800) for _ in range(50 + i)] for i in range(6)]
        out = tmp_path / "log.jsonl"
        address = cluster.router.grpc_address
        recording = asyncio.create_task(
            asyncio.to_thread(record.run, Terminal(), address, TOKEN, out, 5.0, "")
        )
        async with asyncio.timeout(30):
            while not cluster.router._observer.readers:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for i, prompt in enumerate(prompts):
            tokens, _ = await cluster.generate(prompt, max_tokens=3 + i)
            assert tokens == answer(prompt, 3 + i)
        assert await recording == 0
        trace = read_trace(out, 20_000)
        assert [(a.prompt, a.output) for a in trace.arrivals] == [
            (306 + i, 3 + i) for i in range(6)
        ]
        assert {a.blocks[:4] for a in trace.arrivals} == {trace.arrivals[0].blocks[:4]}
        assert {a.block_tokens for a in trace.arrivals} == {64}
        assert set(json.loads(out.read_text().splitlines()[0])) == {
            "at", "prompt", "output", "blocks", "block_tokens", "kind"}  # fmt: skip
        async with asyncio.timeout(30):  # the journal is written behind the requests
            past = ()
            while len(past) < 6:
                past = await asyncio.to_thread(record.past, address, TOKEN, 60.0, "")
        assert sorted((a.prompt, a.output, a.kind) for a in past)[0] == (306, 3, "standard")
        assert await asyncio.to_thread(record.past, address, TOKEN, 60.0, "another") == ()


@pytest.mark.paced
async def test_a_profile_finds_the_engines_own_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_requests, "REST_SECONDS", 0.0)  # it is the same to simulated ones
    settings = config({"speed": 0.5}, placement={"disaggregate": "always"})
    async with simulated_cluster(tmp_path, ROLES, settings) as cluster:
        out = tmp_path / "profile.json"
        wanted = profile.Wanted("llama-3.1-8b", "H200", 1, "", 1024, 8, out)
        address = cluster.router.grpc_address
        assert await asyncio.to_thread(profile.run, Terminal(), address, TOKEN, wanted, True) == 0
        measured = Profile.from_json(out.read_text())
        fitted = calibrate(roofline(load_shape("llama-3.1-8b"), hardware("H200")), measured)
        timing = Timing.of(settings.models[0].simulation)
        for batch, context in ((1, 200), (8, 6000)):
            truth = timing.step((), batch, context)
            assert fitted.performance.decode_seconds(batch, context) == pytest.approx(
                truth, rel=0.2
            )
        truth = timing.prefill(1024, 0, 1024)
        assert fitted.performance.prefill_seconds(1024) == pytest.approx(truth, rel=0.2)
        assert any(s.cached for s in measured.prefill) and measured.handoff
        assert measured.path and all(s.before > 0 and s.bytes for s in measured.path)
        assert measured.chunk == settings.models[0].max_num_batched_tokens
        assert not measured.shared

        little = profile.Wanted("llama-3.1-8b", "H200", 1, "", 128, 4, out, shared=True)
        assert await asyncio.to_thread(profile.run, Terminal(), address, TOKEN, little, True) == 0
        beside = Profile.from_json(out.read_text()).shared
        assert {sample.step for sample in beside} == {"prefill", "decode", "dispatch"}
        assert all(sample.beside > 0 for sample in beside)
        assert any(sample.handoffs for sample in beside)

        busy = asyncio.create_task(cluster.generate([1, 2, 3], max_tokens=15_000))
        async with channel(address, TOKEN) as to, asyncio.timeout(30):
            while not any(  # noqa: ASYNC110 - the router's view
                w.running_sequences for w in (await cluster_view(to)).workers
            ):
                await asyncio.sleep(0.05)
        with pytest.raises(Unavailable, match="measures it alone"):
            await asyncio.to_thread(profile.run, Terminal(), address, TOKEN, wanted, True)
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)


def test_where_a_workers_speed_comes_from(tmp_path: Path) -> None:
    simulated = config()
    speed = speed_of(simulated, simulated.models[0], [])
    timing = Timing.of(simulated.models[0].simulation)
    assert speed.decode_seconds(4, 1000) == pytest.approx(timing.step((), 4, 1000))
    assert speed.prefill_seconds(1536) == pytest.approx(timing.prefill(1536, 0, 1024), rel=0.02)

    shape = tmp_path / "model"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps({
        "num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}))  # fmt: skip

    def real(path: str = str(shape), **planner: object) -> Config:
        return Config.model_validate({"models": [{"name": "m", "path": path}], "planner": planner})

    named = real()
    on_h200 = speed_of(named, named.models[0], ["CPU", "accelerator_type:H200"])
    assert "H200" in on_h200.label
    with pytest.raises(Exception, match=r"planner\.hardware: Ray names A100, H100"):
        speed_of(named, named.models[0], ["accelerator_type:A100", "accelerator_type:H100"])
    kinds = {"prefill": "NVIDIA-H200", "decode": "NVIDIA-L40S"}
    pools = {
        pool: {"labels": {"ray.io/accelerator-type": name}, "num_gpus": 1}
        for pool, name in kinds.items()
    }
    mixed = Config.model_validate({"models": [{"name": "m", "path": str(shape), **pools}]})
    on_both = speed_of(mixed, mixed.models[0], [])
    named_l40s = real(hardware="L40S")
    on_l40s = speed_of(named_l40s, named_l40s.models[0], [])
    assert on_both.prefill_seconds(4000) == on_h200.prefill_seconds(4000)
    assert on_both.decode_seconds(8, 8000) == on_l40s.decode_seconds(8, 8000)
    assert on_both.kv_capacity == on_l40s.kv_capacity < on_h200.kv_capacity
    hub = real("somebody/something")
    with pytest.raises(InvalidRequest, match="cannot tell how large"):
        speed_of(hub, hub.models[0], [])

    other = Profile("model", "H100", 1, (), ())
    (tmp_path / "p.json").write_text(other.to_json())
    wrong = real(profile=tmp_path / "p.json", hardware="H200")
    with pytest.raises(InvalidRequest, match="measure again with `pdserve profile`"):
        speed_of(wrong, wrong.models[0], [])
    gone = real(profile=tmp_path / "none.json", hardware="H200")
    with pytest.raises(InvalidRequest, match=r"planner\.profile: .* cannot be read"):
        speed_of(gone, gone.models[0], [])


async def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    from pdserve.v1 import operator_pb2, operator_pb2_grpc

    async with (
        simulated_cluster(tmp_path, ROLES, config()) as cluster,
        channel(cluster.router.grpc_address, TOKEN) as to,
    ):
        stub = operator_pb2_grpc.OperatorStub(to)
        raw = operator_pb2.ScaleRequest.FromString(b"\xf8\x07\x01")
        with pytest.raises(grpc.aio.AioRpcError, match="unknown field"):
            await stub.Scale(raw, timeout=5)
        with pytest.raises(grpc.aio.AioRpcError, match="say what to release"):
            await stub.Release(operator_pb2.ReleaseRequest(), timeout=5)
