"""Workers that die: their requests go on exactly, or end with a clear error, the survivors' ledgers
return to 0, and the controller puts new lives in their place."""

from __future__ import annotations

import random
import time

import grpc
import psutil
import pytest

from cluster.store.records import WorkerRecord
from examples.recall_task import make_case
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.cluster.running import RunningCluster, generate, registered

RESTART_SECONDS = 200.0
PREFILL, DECODE = "recall-tiny-prefill-0", "recall-tiny-decode-0"


def left_of(family: list[psutil.Process]) -> list[str]:
    """What of the dead worker's processes is still there after a while."""
    _, alive = psutil.wait_procs(family, timeout=10)
    return [f"{p.pid} {p.name()} {p.status()} of {p.parent()}" for p in alive]


def engine_core(worker: psutil.Process) -> psutil.Process:
    """The largest of a worker's processes: its title is not always that of an engine core."""
    return max(worker.children(), key=lambda child: child.memory_info().rss)


def wait_for_new_life(cluster: RunningCluster, before: WorkerRecord) -> None:
    deadline = time.monotonic() + RESTART_SECONDS
    while time.monotonic() < deadline:
        now = registered(cluster).get(before.worker_id)
        connected = any(
            w.worker_id == before.worker_id and w.connected and w.state == "ready"
            for w in cluster.view().workers
        )
        if now and now.incarnation != before.incarnation and now.state == "ready" and connected:
            return
        time.sleep(0.5)
    raise AssertionError(f"{before.worker_id} did not come back")


LONG = common_pb2.SamplingParams(max_tokens=600, temperature=0, ignore_eos=True)
PROMPT = "Here are the codes:\n"


def start(channel: grpc.Channel, sampling: common_pb2.SamplingParams) -> grpc.Call:
    request = inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling)
    return inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=280)


def read(call: grpc.Call, count: int | None = None) -> tuple[list[int], str]:
    """Reads so many tokens, or all; asserts promise I4."""
    tokens: list[int] = []
    text, first = "", 0
    for message in call:
        if message.HasField("delta"):
            first = message.delta.offset if not tokens else first
            assert message.delta.offset == first + len(tokens)
            tokens += message.delta.token_ids
            text += message.delta.text
        if count is not None and len(tokens) >= count:
            break
    return tokens, text


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("worker_id", "victim"),
    [(DECODE, "the worker"), (PREFILL, "its engine")],
    ids=["decode worker killed", "prefill engine killed"],
)
def test_a_dead_worker_is_replaced_and_its_streams_go_on(
    cluster: RunningCluster, channel: grpc.Channel, worker_id: str, victim: str
) -> None:
    whole = read(start(channel, LONG))
    before = registered(cluster)[worker_id]
    call = start(channel, LONG)
    inexact = common_pb2.SamplingParams(
        max_tokens=1900, temperature=1, ignore_eos=True, presence_penalty=0.5
    )
    other = start(channel, inexact)
    tokens, text = read(call, 20)
    read(other, 20)
    process = psutil.Process(before.pid)
    if victim == "its engine":
        process = engine_core(process)
        assert process.nice() == psutil.Process().nice()
    family = psutil.Process(before.pid).children(recursive=True)
    process.kill()
    if worker_id == DECODE:
        with pytest.raises(grpc.RpcError):
            list(other)
        assert other.code() == grpc.StatusCode.UNAVAILABLE
        assert DECODE in other.details()
        assert "presence penalty" in other.details()
    else:
        other.cancel()
    rest, rest_text = read(call)
    assert (tokens + rest, text + rest_text) == whole
    wait_for_new_life(cluster, before)
    assert left_of(family) == []
    case = make_case(random.Random(7), n_facts=30)
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=12)
    assert case.is_right(generate(channel, case.prompt, sampling).completions[0].text)
    cluster.wait_idle()


def test_the_data_path_survives_the_store(cluster: RunningCluster, channel: grpc.Channel) -> None:
    """The store stops answering for a while; requests go on, and so does the cluster after it."""
    assert cluster.process is not None
    store = next(
        p
        for p in psutil.Process(cluster.process.pid).children(recursive=True)
        if "valkey" in p.name()
    )
    case = make_case(random.Random(8), n_facts=30)
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=12)
    store.suspend()
    try:
        for _ in range(3):
            assert case.is_right(generate(channel, case.prompt, sampling).completions[0].text)
    finally:
        store.resume()
    assert case.is_right(generate(channel, case.prompt, sampling).completions[0].text)
    cluster.wait_idle()
