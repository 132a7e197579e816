"""One cluster over several hosts: Ray's head, a prefill worker, a decode worker and the store each
on their own, with a network of its own for the KV transfer. The tests run in this order, on one
cluster: what one breaks, it mends or the next one needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest
import yaml

from cluster.store.records import WorkerRecord
from examples.recall_task import make_cases
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.cluster.running import MODEL, PDSERVE, RunningCluster, generate, registered
from tests.hosts.conftest import Ground
from tests.hosts.namespaces import NamespaceHost
from tests.hosts.ray_cluster import RayCluster, token_less

PREFILL, DECODE = "recall-tiny-prefill-0", "recall-tiny-decode-0"
LEASE_SECONDS = 2.0


def settings(ray_address: str, store_url: str) -> str:
    model = {
        "name": "recall-tiny",
        "path": str(MODEL),
        "dtype": "float32",
        "block_size": 32,
        "max_num_batched_tokens": 256,
        "kv_cache_bytes": 128 << 20,
        "enforce_eager": True,
        "prefill": {"labels": {"pool": "prefill"}, "num_gpus": 0},  # the head claims to have one
        "decode": {"resources": {"decode": 1}, "num_gpus": 0},
    }
    return yaml.safe_dump(
        {
            "name": "hosts",
            "models": [model],
            "router": {"grpc_port": 0, "http_port": 0, "pool": {"resources": {"routers": 1}}},
            "handoff": {"host": "eth1"},
            "placement": {"disaggregate": "always"},
            "ray": {"address": ray_address},
            "store": {"url": store_url, "lease_seconds": LEASE_SECONDS},
            "lifecycle": {"drain_timeout_seconds": 5},
        }
    )


@dataclass
class Hosts:
    """The cluster and where its parts are."""

    cluster: RunningCluster
    ray: RayCluster
    routers: NamespaceHost
    prefill: NamespaceHost
    decode: NamespaceHost
    store: NamespaceHost

    def worker(self, worker_id: str) -> WorkerRecord | None:
        return registered(self.cluster).get(worker_id)


@pytest.fixture(scope="module")
def hosts(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder, ray = tmp_path_factory.mktemp("several"), ground.ray
    routers, prefill, decode = (ground.network.add() for _ in range(3))
    ray.join(routers, routers=1)
    ray.join(prefill, labels="pool=prefill")
    ray.join(decode, decode=1)
    text = settings(ray.address, ground.store_url)
    cluster = RunningCluster(folder, "hosts", text, within=ray.head.within)
    cluster.env = {**ray.env, "PDSERVE_RUNTIME_DIR": str(folder / "run")}
    cluster.start()
    yield Hosts(cluster, ray, routers, prefill, decode, ground.store)
    code, left = cluster.stop()
    assert (code, left) == (0, [])


@pytest.fixture
def channel(hosts: Hosts) -> Iterator[grpc.Channel]:
    with hosts.cluster.channel() as open_channel:
        yield open_channel


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def answers_rightly(hosts: Hosts, channel: grpc.Channel, seed: int, count: int) -> None:
    """Prompts whose one right answer hangs on a detail far back, handed from host to host."""
    for case in make_cases(seed, count, min_tokens=300):
        sampling = common_pb2.SamplingParams(temperature=0, max_tokens=16)
        answer = generate(channel, case.prompt, sampling)
        assert case.is_right(answer.completions[0].text), answer.completions[0].text
        report = answer.completed.completions[0]
        assert (report.prefill_worker, report.decode_worker) == (PREFILL, DECODE)
        assert report.handoff.bytes > 0
    hosts.cluster.wait_idle()


def test_each_part_is_where_its_resources_and_labels_are(hosts: Hosts) -> None:
    prefill, decode = hosts.worker(PREFILL), hosts.worker(DECODE)
    assert prefill is not None and decode is not None
    for record, host in ((prefill, hosts.prefill), (decode, hosts.decode)):
        assert record.address.startswith(f"{host.address}:")
        assert record.metrics_address.startswith(f"{host.address}:")
        assert record.transfer_addresses[0].startswith(f"{host.second}:")
    (router,) = hosts.cluster.view().routers
    for address in (router.grpc_address, router.http_address):
        assert address.startswith(f"{hosts.routers.address}:")


def test_no_server_of_a_worker_listens_beyond_its_interface(hosts: Hosts) -> None:
    for worker_id, host in ((PREFILL, hosts.prefill), (DECODE, hosts.decode)):
        record = hosts.worker(worker_id)
        assert record is not None
        listening = host.listening()
        for address in (record.address, record.metrics_address, *record.transfer_addresses):
            port = address.rpartition(":")[2]
            assert {at for at in listening if at.endswith(f":{port}")} == {address}


def test_ray_serves_nobody_without_the_token(hosts: Hosts) -> None:
    head = hosts.ray.head
    assert not [at for at in head.listening() if at.endswith(":8265")]  # the dashboard
    with (
        grpc.insecure_channel(f"{head.address}:10001") as ray_client,
        pytest.raises(grpc.RpcError) as refused,
    ):
        ray_client.unary_unary("/ray.rpc.RayletDriver/ClusterInfo")(b"", timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    done = token_less(hosts.ray, PDSERVE, "up", "-f", str(hosts.cluster.file))
    assert done.returncode == 1 and "RAY_AUTH_TOKEN_PATH" in done.stderr, done.stderr


def test_prompts_cross_hosts(hosts: Hosts, channel: grpc.Channel) -> None:
    answers_rightly(hosts, channel, seed=61, count=8)


def test_a_host_is_cut_off_and_comes_back(hosts: Hosts, channel: grpc.Channel) -> None:
    before = hosts.worker(DECODE)
    assert before is not None
    sampling = common_pb2.SamplingParams(max_tokens=1500, temperature=1, ignore_eos=True)
    request = inference_pb2.GenerateRequest(text="Here are the codes:\n", sampling=sampling)
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60)
    next(call)
    next(call)
    hosts.decode.cut_off()
    try:
        until(lambda: hosts.worker(DECODE) is None, 20, "its lease never ran out")
    finally:
        hosts.decode.reconnect()
    until(lambda: connected(hosts, before.incarnation), 30, "the same life does not come back")
    ends(call)
    answers_rightly(hosts, channel, seed=62, count=2)


@pytest.mark.timeout(400)
def test_a_host_is_lost_and_another_joins(hosts: Hosts, channel: grpc.Channel) -> None:
    before = hosts.worker(DECODE)
    assert before is not None
    hosts.decode.lose()
    wanted = f"{DECODE}: waiting for 1 decode; no host has 1 decode: none has any"
    until(lambda: wanted in hosts.cluster.log.read_text(), 90, "what is missing is not named")
    hosts.decode = hosts.ray.network.add()
    hosts.ray.join(hosts.decode, decode=1)

    def new_life() -> bool:
        now = hosts.worker(DECODE)
        return (
            now is not None
            and now.incarnation != before.incarnation
            and now.address.startswith(f"{hosts.decode.address}:")
            and connected(hosts, now.incarnation)
        )

    until(new_life, 200, "the worker does not appear on the new host")
    answers_rightly(hosts, channel, seed=63, count=4)


def ends(call: grpc.Call) -> None:
    """A stream whose decode worker was away ends, in one way or the other, by its deadline."""
    try:
        last = [message.WhichOneof("event") for message in call][-1]
        assert last == "completed"
    except grpc.RpcError:
        assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def connected(hosts: Hosts, incarnation: str) -> bool:
    """Whether the router has a stream to that life of the decode worker."""
    return any(
        worker.incarnation == incarnation and worker.connected and worker.state == "ready"
        for worker in hosts.cluster.view().workers
    )
