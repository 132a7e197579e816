"""A cluster that scales itself: simulated engines behind the real controller, Ray, Valkey, routers.

The load shifts from long prompts to long answers: workers change their roles, nothing is lost, no
stream breaks, every answer is exact. Then people steer it, and the controller dies.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from cluster.engine.simulated.tokens import continuation
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.cluster.running import RunningCluster, registered

pytestmark = pytest.mark.paced
MODEL = Path(__file__).resolve().parents[2] / "examples" / "recall-tiny"
VOCAB, SEED = 200, 5

CONFIG = f"""
name: {{name}}
models:
- name: m
  path: {MODEL}
  engine: simulated
  max_model_len: 8000
  simulation:
    step_seconds: 0.02
    prefill_token_seconds: 1.0e-4
    prefill_pair_seconds: 0
    decode_sequence_seconds: 1.0e-3
    decode_token_seconds: 0
    vocab_size: {VOCAB}
    seed: {SEED}
  prefill: {{{{replicas: 2}}}}
  decode: {{{{replicas: 2}}}}
router: {{{{grpc_port: 0, http_port: 0}}}}
placement: {{{{disaggregate: always}}}}
classes: {{{{interactive: {{{{ttft_seconds: 1.5, tpot_seconds: 0.033}}}}}}}}
lifecycle: {{{{drain_timeout_seconds: 10}}}}
planner:
  mode: act
  interval_seconds: 0.5
  cold_start_seconds: 10
  flip_drain_seconds: 3
  down_after_seconds: 900
  budget: [{{{{name: hosts, gpus: 4}}}}]
secret: {{secret}}
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    cluster = RunningCluster(tmp_path_factory.mktemp("planner"), "acts", CONFIG)
    cluster.start()
    yield cluster
    if cluster.process is not None and cluster.process.poll() is None:
        code, left = cluster.stop()
        assert (code, left) == (0, [])


def roles(cluster: RunningCluster) -> Counter[str]:
    """Of the ready workers, as they are registered."""
    return Counter(w.role for w in registered(cluster).values() if w.state == "ready")


def until(
    cluster: RunningCluster, true: Callable[[Counter[str]], bool], seconds: float = 30
) -> Counter[str]:
    deadline = time.monotonic() + seconds
    while not true(roles(cluster)):
        assert time.monotonic() < deadline, f"{roles(cluster)}: {explained(cluster)[:3]}"
        time.sleep(0.2)
    return roles(cluster)


def ordered(cluster: RunningCluster, *args: str) -> str:
    done = cluster.pdserve(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def explained(cluster: RunningCluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        ordered(cluster, "explain", "--limit", "200", "--json")
    )
    return found


def plan_of(cluster: RunningCluster) -> dict[str, Any]:
    view = json.loads(ordered(cluster, "recommend", "--json"))
    assert view["mode"] == "act"
    (plan,) = view["models"]
    return dict(plan)


class Load:
    """Requests at a rate, each checked to the last token; one that is refused comes again."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceStub(channel)
        self._rng = random.Random(9)
        self.ended = 0

    async def run(
        self, rate: float, prompt: int, output: int, over: Callable[[], bool], least: float
    ) -> None:
        """Until `over`, and so many seconds at least."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while time.monotonic() - began < least or not over():
                tasks.create_task(self._one(prompt, output))
                await asyncio.sleep(self._rng.expovariate(rate))

    async def _one(self, prompt: int, output: int) -> None:
        ids = [self._rng.randrange(VOCAB) for _ in range(prompt)]
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=ids),
            sampling=common_pb2.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
            slo_class=common_pb2.SLO_CLASS_INTERACTIVE,
        )
        for wait in itertools.repeat(0.5):
            if await self._served(request, continuation(ids, output, SEED, VOCAB)):
                break
            await asyncio.sleep(wait)
        self.ended += 1

    async def _served(self, request: inference_pb2.GenerateRequest, due: list[int]) -> bool:
        """False: refused, before it began, because it could not be in time now."""
        tokens: list[int] = []
        completed = False
        try:
            async for message in self._stub.Generate(request, timeout=60):
                if message.HasField("completed"):
                    completed = True
                else:
                    assert message.delta.offset == len(tokens)
                    tokens += message.delta.token_ids
        except grpc.aio.AioRpcError as error:
            if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or tokens:
                raise
            return False
        assert completed and tokens == due
        return True


def turned(cluster: RunningCluster, seen: Counter[str], role: str) -> Callable[[], bool]:
    """A check that looks at the registry in the background, twice a second."""
    deadline, looked = time.monotonic() + 40, [0.0]

    def over() -> bool:
        if time.monotonic() - looked[0] > 0.5:
            looked[0] = time.monotonic()
            seen.clear()
            seen.update(roles_in(cluster))
        assert time.monotonic() < deadline, f"{seen}: {explained(cluster)[:3]}"
        return seen[role] >= 3

    return over


def roles_in(cluster: RunningCluster) -> Counter[str]:
    """As `roles`, from within a running event loop."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(roles, cluster).result()


def test_roles_follow_the_load(running: RunningCluster) -> None:
    before = {w.worker_id: w.incarnation for w in registered(running).values()}

    async def shift() -> int:
        async with grpc.aio.insecure_channel(running.grpc_address) as channel:
            load = Load(channel)
            seen: Counter[str] = Counter()
            await load.run(9.0, 2000, 4, turned(running, seen, "prefill"), 5.0)
            await load.run(5.0, 40, 130, turned(running, seen, "decode"), 5.0)
            return load.ended

    ended = asyncio.run(shift())
    assert ended > 50
    after = registered(running)
    assert {w.worker_id: w.incarnation for w in after.values()} == before  # nothing was reloaded
    assert sum(w.epoch for w in after.values()) >= 3
    running.wait_idle()

    acted = [d for d in explained(running) if d["acted"] and d["actions"]]
    assert {a["kind"] for d in acted for a in d["actions"]} == {"flip"}
    assert all(d["reasons"] and d["inputs"]["rate_expected"] > 0 for d in acted)
    plan = plan_of(running)
    assert plan["done"]["flips"] >= 3
    assert set(plan["attainment"]) == {"interactive"}
    deadline = time.monotonic() + 15
    while True:  # routers read the plan now and then
        with urllib.request.urlopen(f"http://{running.http_address}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
        flips = [x for x in lines if 'plan_actions_total{kind="flips",model="m"}' in x]
        if flips and float(flips[0].split()[-1]) == plan["done"]["flips"]:
            break
        assert time.monotonic() < deadline, [x for x in lines if "pdserve_plan" in x]
        time.sleep(0.5)


def test_the_advisor_reads_the_past_of_the_cluster(running: RunningCluster) -> None:
    """The load of the test before: long prompts with short answers, then the other way round."""

    def advised(*more: str) -> subprocess.CompletedProcess[str]:
        worker = ("--model", "llama-3.1-8b", "--gpu", "L40S", "--gpus", "3")
        options = (*worker, "--slo", "ttft=2,tpot=0.08")
        return running.pdserve("plan", "--from-cluster", *options, *more, timeout=300)

    done = advised("--served", "m", "--json")
    assert done.returncode == 0, done.stderr
    advice = json.loads(done.stdout)
    assert advice["trace"]["requests"] > 50 and advice["trace"]["rate"] > 0
    assert {o["option"] for o in advice["options"]} == {"3 aggregated", "1P:2D", "2P:1D"}
    assert advice["best"] in {o["option"] for o in advice["options"]}
    assert max(o["goodput"] for o in advice["options"]) > 0

    nobody = advised("--served", "nobody")
    assert nobody.returncode != 0
    assert "the cluster's journal is empty" in nobody.stderr
    both = advised("--trace", str(running.file))
    assert both.returncode != 0
    assert "give --trace FILE, or --from-cluster" in both.stderr


def test_people_steer_and_the_controller_dies(running: RunningCluster) -> None:
    flips = plan_of(running)["done"]["flips"]
    said = ordered(running, "scale", "prefill", "2")
    assert "prefill is held at 2" in said and "pdserve release m" in said
    until(running, lambda r: r == {"prefill": 2, "decode": 2})
    one = next(w.worker_id for w in registered(running).values() if w.role == "prefill")
    # The controller looks at the registry every half second; a refusal changes nothing.
    accepted: list[str] = []

    def flipped(_: object) -> bool:
        done = running.pdserve("flip", one, "decode")
        if done.returncode == 0:
            accepted.append(done.stdout)
        return bool(accepted)

    until(running, flipped, 10)
    assert f"{one} becomes decode" in accepted[0]
    until(running, lambda r: r == {"prefill": 1, "decode": 3})

    other = next(w.worker_id for w in registered(running).values() if w.worker_id != one
                 and w.role == "decode")  # fmt: skip
    ordered(running, "drain", other)
    until(running, lambda r: r == {"prefill": 1, "decode": 2})
    assert other not in registered(running)
    ordered(running, "targets", "interactive", "--ttft", "0.7")

    changed = running.file.read_text().replace(
        "{interactive:", "{standard: {ttft_seconds: 7}, interactive:"
    )
    running.file.write_text(changed)
    assert "classes.standard.ttft_seconds: 30.0 → 7.0" in ordered(
        running, "reload", "-f", str(running.file)
    )

    lives = {w.worker_id: w.incarnation for w in registered(running).values()}
    assert running.process is not None
    for process in psutil.Process(running.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "ray::Controller" in " ".join(process.cmdline()):
                process.kill()
    until(running, lambda _: not lives.items() & {
        (w.worker_id, w.incarnation) for w in registered(running).values()})  # fmt: skip
    until(running, lambda r: r == {"prefill": 1, "decode": 2}, 60)
    assert other not in registered(running)
    running.find_router()  # its next life has another port
    plan = plan_of(running)
    assert plan["manual"] == {"prefill": 1, "decode": 2}
    assert plan["drained_workers"] == [other]
    assert plan["targets"]["interactive"]["ttft_seconds"] == 0.7
    assert plan["targets"]["standard"]["ttft_seconds"] == 7.0  # as reloaded, not as first started
    assert plan["done"]["flips"] > flips

    ordered(running, "release", other)
    until(running, lambda r: r == {"prefill": 1, "decode": 3})
    wrong = running.pdserve("flip", "nobody", "decode")
    assert wrong.returncode == 1 and "there is no worker 'nobody'" in wrong.stderr
    ordered(running, "release", "--all")
