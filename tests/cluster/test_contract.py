"""What clients may rely on, with real engines: resuming, repeating, batch jobs, publishing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import grpc

from examples.recall_task import make_case
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.cluster.running import RunningCluster

TIMEOUT = 120.0
GREEDY = common_pb2.SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def read(call: grpc.Call, count: int | None = None) -> list[int]:
    tokens: list[int] = []
    for message in call:
        tokens += message.delta.token_ids
        if count is not None and len(tokens) >= count:
            break
    return tokens


def test_a_broken_stream_goes_on_where_it_was(
    cluster: RunningCluster, channel: grpc.Channel
) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GenerateRequest(
        text="Here are the codes:\n", sampling=GREEDY, request_id="resumed", resumable=True
    )
    call = stub.Generate(request, timeout=TIMEOUT)
    first = read(call, 7)
    call.cancel()
    resume = inference_pb2.ResumeRequest(request_id="resumed", next_offset=[len(first)])
    rest = read(stub.Resume(resume, timeout=TIMEOUT))
    plain = inference_pb2.GenerateRequest(text="Here are the codes:\n", sampling=GREEDY)
    assert first + rest == read(stub.Generate(plain, timeout=TIMEOUT))
    cluster.wait_idle()


def test_a_repetition_is_the_same_answer(channel: grpc.Channel) -> None:
    stub = inference_pb2_grpc.InferenceStub(channel)
    sampling = common_pb2.SamplingParams(temperature=1, max_tokens=40, ignore_eos=True)
    request = inference_pb2.GenerateRequest(
        text="Here are the codes:\n", sampling=sampling, idempotency_key="again"
    )
    first, second = (read(stub.Generate(request, timeout=TIMEOUT)) for _ in range(2))
    assert len(first) == 40
    assert first == second


def test_time_to_publish(channel: grpc.Channel) -> None:
    case = make_case(random.Random(3), n_facts=20)
    request = inference_pb2.GenerateRequest(
        text=case.prompt,
        sampling=common_pb2.SamplingParams(temperature=0, max_tokens=12),
        publish_after_text=case.answer[:2],
    )
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=TIMEOUT)
    (report,) = list(call)[-1].completed.completions
    assert report.publish_seconds > report.ttft_seconds


def test_a_batch_job(cluster: RunningCluster, tmp_path: Path) -> None:
    cases = {f"id-{i}": make_case(random.Random(i), n_facts=20) for i in range(24)}
    lines = [
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": "recall-tiny",
                "prompt": case.prompt,
                "temperature": 0,
                "max_tokens": 12,
            },
        }
        for custom_id, case in cases.items()
    ]
    file = tmp_path / "batch.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    submitted = cluster.pdserve(
        "batch", "submit", str(file), "--endpoint", "/v1/completions", "--json"
    )
    assert submitted.returncode == 0, submitted.stderr
    batch_id = json.loads(submitted.stdout)["batch_id"]
    done = cluster.pdserve("batch", "results", batch_id, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(cases)
    for result in results:
        text = result["response"]["body"]["choices"][0]["text"]
        assert cases[result["custom_id"]].is_right(text)
    cluster.wait_idle()
