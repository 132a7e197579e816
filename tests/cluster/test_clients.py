"""The clients users bring: the official openai package, and gRPC by reflection alone."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from typing import Any

import grpc
import openai
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from examples.recall_task import Case, make_case
from tests.cluster.running import RunningCluster, registered


@pytest.fixture
def client(cluster: RunningCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{cluster.http_address}/v1", api_key="none")


@pytest.fixture
def case() -> Case:
    return make_case(random.Random(9), n_facts=50)


def test_completions(client: openai.OpenAI, case: Case) -> None:
    reply = client.completions.create(
        model="recall-tiny", prompt=case.prompt, temperature=0, max_tokens=12
    )
    assert reply.choices[0].text == case.answer
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.completion_tokens == 7


def test_completions_streaming(client: openai.OpenAI, case: Case) -> None:
    chunks = list(
        client.completions.create(
            model="recall-tiny", prompt=case.prompt, temperature=0, max_tokens=12, stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == case.answer


def test_chat(client: openai.OpenAI, case: Case) -> None:
    reply = client.chat.completions.create(
        model="recall-tiny",
        messages=case.messages(),
        temperature=0,
        max_tokens=12,  # type: ignore[arg-type]
    )
    assert reply.choices[0].message.content == case.answer


def test_chat_streaming_with_usage(client: openai.OpenAI, case: Case) -> None:
    chunks = list(
        client.chat.completions.create(
            model="recall-tiny",
            messages=case.messages(),  # type: ignore[arg-type]
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == case.answer
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 7


def test_chat_logprobs_and_n(client: openai.OpenAI, case: Case) -> None:
    reply = client.chat.completions.create(
        model="recall-tiny",
        messages=case.messages(),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=12,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.message.content for choice in reply.choices] == [case.answer] * 2
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content[:6]) == case.answer


def test_guided_json(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="recall-tiny",
        messages=[{"role": "user", "content": "Is it so?"}],
        temperature=0,
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    )
    assert isinstance(json.loads(reply.choices[0].message.content or "")["ok"], bool)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["recall-tiny"]


@pytest.mark.parametrize("path", ["healthz", "readyz", "metrics"])
def test_probes(cluster: RunningCluster, path: str) -> None:
    with urllib.request.urlopen(f"http://{cluster.http_address}/{path}") as reply:
        assert reply.status == 200


def test_metrics_have_units_and_values(client: openai.OpenAI, cluster: RunningCluster) -> None:
    test_completions(client, make_case(random.Random(1), n_facts=5))
    with urllib.request.urlopen(f"http://{cluster.http_address}/metrics") as reply:
        text = reply.read().decode()
    for name in (
        "pdserve_requests_total",
        "pdserve_request_tokens_total",
        'pdserve_phase_seconds_count{phase="handoff_wait"}',
        "pdserve_ttft_seconds_count",
        "pdserve_handoff_bytes_total",
    ):
        assert name in text


def test_reflection_is_enough_to_generate(channel: grpc.Channel, case: Case) -> None:
    """As grpcurl does it: no generated code."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    method = pool.FindServiceByName("pdserve.v1.Inference").methods_by_name["Generate"]
    ask = message_factory.GetMessageClass(method.input_type)
    reply = message_factory.GetMessageClass(method.output_type)
    call: Any = channel.unary_stream(
        "/pdserve.v1.Inference/Generate",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=reply.FromString,
    )
    body = {"text": case.prompt, "sampling": {"temperature": 0, "maxTokens": 12}}
    messages = call(json_format.ParseDict(body, ask()), timeout=60)
    assert "".join(message.delta.text for message in messages) == case.answer


def test_health(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_generate_command(cluster: RunningCluster, case: Case) -> None:
    done = cluster.pdserve("generate", case.prompt, "--temperature", "0", "--max-tokens", "12")
    assert (done.returncode, done.stdout.strip()) == (0, case.answer)


def test_status_command(cluster: RunningCluster) -> None:
    done = cluster.pdserve("status", "--json")
    assert done.returncode == 0
    workers = json.loads(done.stdout)["workers"]
    assert {worker["role"] for worker in workers} == {"prefill", "decode"}
    assert {worker["state"] for worker in workers} == {"ready"}


def test_workers_export_vllms_metrics_and_ours(cluster: RunningCluster) -> None:
    """What a worker pins reads 0 again once it has been idle for a look or two."""
    for worker in registered(cluster).values():
        wanted = f'pdserve_kv_pinned_bytes{{reason="reserved",role="{worker.role}"}} 0.0'
        deadline = time.monotonic() + 30
        while True:
            with urllib.request.urlopen(f"http://{worker.metrics_address}/metrics") as reply:
                text = reply.read().decode()
            assert "vllm:num_requests_running" in text
            if wanted in text:
                break
            ours = [line for line in text.splitlines() if line.startswith("pdserve_kv")]
            assert time.monotonic() < deadline, ours
            time.sleep(0.5)
