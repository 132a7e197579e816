"""Each bad input gets its own status and a message that names the field and the limit, and leaves
the cluster serving."""

from __future__ import annotations

import json
import math
import random
import urllib.error
import urllib.request
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_status import rpc_status

from examples.recall_task import make_case
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.cluster.running import CONTEXT, RunningCluster, generate

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FINE = {"max_tokens": 2, "temperature": 0}


@pytest.fixture(autouse=True)
def still_serves(channel: grpc.Channel) -> Any:
    """After every case."""
    yield
    case = make_case(random.Random(3), n_facts=8)
    answer = generate(channel, case.prompt, common_pb2.SamplingParams(temperature=0, max_tokens=12))
    assert case.is_right(answer.completions[0].text)


def refusal(
    channel: grpc.Channel, request: Message, timeout: float | None = 30
) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout))
    error: Any = caught.value
    assert "Traceback" not in error.details()
    return error.code(), error.details()


def ask(
    ids: list[int] | None = None, sampling: dict[str, Any] | None = None, **fields: Any
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        sampling=common_pb2.SamplingParams(**{**FINE, **(sampling or {})}), **fields
    )
    if ids is not None:
        request.token_ids.ids.extend(ids)
    return request


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(), ["prompt"]),
        (ask(text=""), ["text", "at least one token"]),
        (ask(token_ids=inference_pb2.TokenIds()), ["token_ids", "at least one token"]),
        (ask(ids=[7] * CONTEXT), ["token_ids", str(CONTEXT)]),
        (ask(ids=[7] * 2000, sampling={"max_tokens": 49}), ["max_tokens", str(CONTEXT)]),
        (ask(ids=[569]), ["token_ids", "569"]),
        (ask(ids=[2**32 - 1]), ["token_ids"]),
        (ask(text="hi", sampling={"temperature": -0.1}), ["temperature"]),
        (ask(text="hi", sampling={"temperature": math.nan}), ["temperature"]),
        (ask(text="hi", sampling={"temperature": 1e9}), ["temperature"]),
        (ask(text="hi", sampling={"top_p": 0.0}), ["top_p"]),
        (ask(text="hi", sampling={"top_p": math.inf}), ["top_p"]),
        (ask(text="hi", sampling={"min_p": -1.0}), ["min_p"]),
        (ask(text="hi", sampling={"presence_penalty": 2.5}), ["presence_penalty"]),
        (ask(text="hi", sampling={"frequency_penalty": -3.0}), ["frequency_penalty"]),
        (ask(text="hi", sampling={"repetition_penalty": 0.0}), ["repetition_penalty"]),
        (ask(text="hi", sampling={"max_tokens": 0}), ["max_tokens"]),
        (ask(text="hi", sampling={"min_tokens": 3}), ["min_tokens", "max_tokens"]),
        (ask(text="hi", sampling={"n": 17}), ["n", "16"]),
        (ask(text="hi", sampling={"logprobs": 21}), ["logprobs", "20"]),
        (ask(text="hi", sampling={"stop": ["x"] * 17}), ["stop", "16"]),
        (ask(text="hi", sampling={"stop": [""]}), ["stop"]),
        (ask(text="hi", sampling={"stop_token_ids": [9999]}), ["stop_token_ids"]),
        (ask(text="hi", sampling={"logit_bias": {9999: 1.0}}), ["logit_bias"]),
        (ask(text="hi", sampling={"guide": common_pb2.Guide(json_schema="{")}), ["guide"]),
        (ask(text="hi", sampling={"guide": common_pb2.Guide(regex="(")}), ["guide"]),
        (ask(text="hi", request_id="no spaces"), ["request_id"]),
        (ask(text="hi", request_id="x" * 129), ["request_id", "128"]),
        (ask(text="hi", cache_salt="x" * 1000), ["cache_salt"]),
        (
            ask(chat=inference_pb2.ChatPrompt(messages=[])),
            ["messages"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_with_the_field_and_the_limit(
    channel: grpc.Channel, request_: Message, words: list[str]
) -> None:
    code, details = refusal(channel, request_)
    assert code == INVALID, details
    for word in words:
        assert word in details


def test_details_name_the_field(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(
            inference_pb2_grpc.InferenceStub(channel).Generate(
                ask(text="hi", sampling={"top_p": 3.0}), timeout=10
            )
        )
    status = rpc_status.from_call(caught.value)
    assert "top_p" in str(status.details)
    assert "google.rpc.BadRequest" in status.details[0].type_url


@pytest.mark.parametrize("regex", ["((a{0,100}){0,100}){0,100}", "(a|aa)+(a|aa)+(a|aa)+b" * 20])
def test_a_guide_that_explodes_hurts_nobody_else(channel: grpc.Channel, regex: str) -> None:
    """It may end in any way, but soon; `still_serves` does the rest."""
    guide = common_pb2.Guide(regex=regex)
    request = ask(text="hi", sampling={"max_tokens": 60, "guide": guide})
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=30)
    try:
        list(call)
    except grpc.RpcError:
        assert call.code() != grpc.StatusCode.DEADLINE_EXCEEDED


def test_unknown_model(channel: grpc.Channel) -> None:
    code, details = refusal(channel, ask(text="hi", model="other"))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "recall-tiny" in details


def test_a_deadline_is_required(channel: grpc.Channel) -> None:
    code, details = refusal(channel, ask(text="hi"), timeout=None)
    assert code == INVALID and "deadline" in details


def test_a_deadline_that_passes(channel: grpc.Channel) -> None:
    code, _ = refusal(
        channel, ask(ids=[7] * 32, sampling={"max_tokens": 1900, "ignore_eos": True}), timeout=0.2
    )
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_transfer_field_is_refused(channel: grpc.Channel) -> None:
    """A client that adds fields of its own, such as where KV should come from."""
    wire = ask(text="hi").SerializeToString() + b"\xfa\x01\x0ekv_transfer_to"
    code, details = refusal(channel, inference_pb2.GenerateRequest.FromString(wire))
    assert code == INVALID and "unknown" in details.lower()


def test_a_message_over_the_cap(channel: grpc.Channel) -> None:
    code, _ = refusal(channel, ask(text="x" * (64 << 20)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


def post(cluster: RunningCluster, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        f"http://{cluster.http_address}{path}", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


GOOD = {"model": "recall-tiny", "prompt": "hi", "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, ""),
        (b"\xff\xfe", 400, ""),
        (b"", 400, ""),
        (json.dumps({**GOOD, "prompt": 7}).encode(), 400, "prompt"),
        (json.dumps({**GOOD, "prompt": ""}).encode(), 400, "prompt"),
        (json.dumps({**GOOD, "max_tokens": "two"}).encode(), 400, "max_tokens"),
        (json.dumps({**GOOD, "temperature": -1}).encode(), 400, "temperature"),
        (json.dumps({**GOOD, "temperature": math.nan}).encode(), 400, "temperature"),
        (json.dumps({**GOOD, "colour": "red"}).encode(), 400, "colour"),
        (json.dumps({**GOOD, "kv_transfer_params": {}}).encode(), 400, "kv_transfer_params"),
        (json.dumps({**GOOD, "model": "other"}).encode(), 404, "other"),
        (json.dumps({"prompt": "hi"}).encode(), 400, "model"),
        (b'{"prompt": "' + b"x" * (64 << 20) + b'"}', 413, ""),
    ],
    ids=lambda value: value[:40].decode(errors="replace") if isinstance(value, bytes) else "",
)
def test_http_errors_have_openai_shape(
    cluster: RunningCluster, body: bytes, status: int, word: str
) -> None:
    try:
        got, reply = post(cluster, "/v1/completions", body)
    except urllib.error.URLError:
        assert status == 413  # the server may close before it has read 64 MiB
        return
    assert got == status
    assert {"message", "type", "param", "code"} == reply["error"].keys()
    assert word in json.dumps(reply)
