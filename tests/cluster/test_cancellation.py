"""A client that goes away before, during and after each phase: both engines stop working on its
request and free its blocks (promise I3)."""

from __future__ import annotations

import http.client
import json
import random
import time

import grpc
import pytest

from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.cluster.running import RunningCluster

LONG = common_pb2.SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


def long_request(request_id: str = "") -> inference_pb2.GenerateRequest:
    rng = random.Random(time.monotonic_ns())
    prompt = [rng.randrange(6, 569) for _ in range(1500)]
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt), sampling=LONG, request_id=request_id
    )


@pytest.mark.parametrize("seconds", [0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8])
def test_gone_after_some_time(
    cluster: RunningCluster, channel: grpc.Channel, seconds: float
) -> None:
    call = inference_pb2_grpc.InferenceStub(channel).Generate(long_request(), timeout=60)
    time.sleep(seconds)
    call.cancel()
    cluster.wait_idle()


@pytest.mark.parametrize("messages", [1, 2, 3, 20])
def test_gone_after_some_messages(
    cluster: RunningCluster, channel: grpc.Channel, messages: int
) -> None:
    call = inference_pb2_grpc.InferenceStub(channel).Generate(long_request(), timeout=60)
    for _ in range(messages):
        next(call)
    call.cancel()
    cluster.wait_idle()


def test_many_gone_at_once(cluster: RunningCluster, channel: grpc.Channel) -> None:
    rng = random.Random(4)
    stub = inference_pb2_grpc.InferenceStub(channel)
    calls = [stub.Generate(long_request(), timeout=60) for _ in range(24)]
    for call in calls:
        time.sleep(rng.random() * 0.1)
        call.cancel()
    cluster.wait_idle(40)


def test_cancel_by_id(cluster: RunningCluster, channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    call = stub.Generate(long_request("to-be-cancelled"), timeout=60)
    next(call)
    assert stub.Cancel(
        inference_pb2.CancelRequest(request_id="to-be-cancelled"), timeout=10
    ).cancelled
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() == grpc.StatusCode.CANCELLED
    assert not stub.Cancel(inference_pb2.CancelRequest(request_id="unknown"), timeout=10).cancelled
    cluster.wait_idle()


def test_a_deadline_frees_everything(cluster: RunningCluster, channel: grpc.Channel) -> None:
    call = inference_pb2_grpc.InferenceStub(channel).Generate(long_request(), timeout=0.7)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    cluster.wait_idle()


def test_an_http_client_that_hangs_up(cluster: RunningCluster) -> None:
    body = {"model": "recall-tiny", "prompt": "hi", "max_tokens": 500, "stream": True}
    body["ignore_eos"] = True
    connection = http.client.HTTPConnection(cluster.http_address)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    reply = connection.getresponse()
    assert reply.status == 200
    reply.read(20)
    connection.sock.close() if connection.sock else None
    connection.close()
    cluster.wait_idle()
