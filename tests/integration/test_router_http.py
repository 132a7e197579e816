"""The OpenAI face, driven by OpenAI's own client and by plain HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest

from pdserve.v1 import common_pb2, worker_pb2
from tests.integration.router_fakes import (
    MODEL,
    Cluster,
    FakeWorker,
    Send,
    running_cluster,
    token_output,
)

TIMEOUT = 30.0
HELLO: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster(max_request_bytes=65536) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT
    ) as client:
        yield client


@pytest.fixture
async def http(cluster: Cluster) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(cluster.url) as session:
        yield session


async def test_completion(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="hi", max_tokens=3, n=2, seed=1)
    assert [(c.index, c.text, c.finish_reason) for c in reply.choices] == [
        (0, "t0 t1 t2 ", "length"),
        (1, "t0 t1 t2 ", "length"),
    ]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 6)
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")


async def test_completion_defaults_to_16_tokens(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt=[5, 6])
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16


async def test_completion_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL,
        prompt=["hi"],
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "t0 t1 t2 "
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 6


async def test_chat(cluster: Cluster, client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_completion_tokens=3,
        temperature=0,
        stop=["\n"],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"type": "object"}},
        },
        extra_body={"top_k": 5, "cache_salt": "mine"},
    )
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "t0 t1 t2 ")
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    start = cluster.prefill.started.get_nowait()
    assert start.cache_salt == "mine"
    assert json.loads(start.sampling.guide.json_schema) == {"type": "object"}
    assert (start.sampling.top_k, list(start.sampling.stop)) == (5, ["\n"])
    assert start.sampling.temperature == 0


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, n=2, stream=True
    )
    texts = {0: "", 1: ""}
    finished = set()
    first = True
    async for chunk in stream:
        (choice,) = chunk.choices
        if first:
            assert choice.delta.role == "assistant"
            first = False
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished.add(choice.index)
    assert texts == {0: "t0 t1 t2 ", 1: "t0 t1 t2 "}
    assert finished == {0, 1}


async def test_an_answer_goes_back_as_it_is_for_the_next_turn(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1)
    turns: list[Any] = [*HELLO, reply.choices[0].message, {"role": "user", "content": "and?"}]
    reply = await client.chat.completions.create(model=MODEL, messages=turns, max_tokens=1)
    assert reply.choices[0].message.content == "t0 "


async def test_openais_other_fields_may_be_left_out_by_name(http: aiohttp.ClientSession) -> None:
    others = (
        "tools tool_choice parallel_tool_calls functions function_call metadata store service_tier "
        "reasoning_effort audio modalities moderation prediction prompt_cache_key "
        "prompt_cache_options prompt_cache_retention safety_identifier verbosity web_search_options"
    )
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1, **dict.fromkeys(others.split())}
    async with http.post("/v1/chat/completions", json=body) as reply:
        assert reply.status == 200
    async with http.post("/v1/chat/completions", json={**body, "tools": []}) as reply:
        error = (await reply.json())["error"]
    assert (reply.status, error["param"]) == (400, "tools")
    assert "not supported" in error["message"]


async def test_logprobs(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="hi", max_tokens=2, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.token_logprobs) == (["t0 ", "t1 "], [-0.5, -0.5])
    assert logprobs.text_offset == [0, 3]
    assert logprobs.top_logprobs == [{"t0 ": -0.5, "x": -9999.0}, {"t1 ": -0.5, "x": -9999.0}]
    chat = await client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1, logprobs=True, top_logprobs=2
    )
    chat_logprobs = chat.choices[0].logprobs
    assert chat_logprobs is not None and chat_logprobs.content is not None
    assert chat_logprobs.content[0].token == "t0 "
    assert [t.token for t in chat_logprobs.content[0].top_logprobs] == ["t0 ", "x"]


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [m.id async for m in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError, match=MODEL):
        await client.models.retrieve("other/model")


async def test_unknown_model(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        await client.chat.completions.create(model="other", messages=HELLO)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "x", "temperature": 3}, "temperature", "from 0 to 2"),
    ({"prompt": "x", "n": 99}, "n", "from 1 to 16"),
    ({"prompt": "x", "max_tokens": "3"}, "max_tokens", "integer"),
    ({"prompt": "x", "max_tokens": 50_000}, "max_tokens", "context of 20000"),
    ({"prompt": "x" * 20_000}, "prompt", "at most 19999"),
    ({"prompt": []}, "prompt", "at least one token"),
    ({"prompt": ["a", "b"]}, "prompt", "one prompt"),
    ({"prompt": [1000]}, "prompt", "vocabulary of 1000"),
    ({}, "prompt", "is required"),
    ({"prompt": "x", "echo": True}, "echo", "not supported"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "not a token id"),
    ({"prompt": "x", "stop": [""]}, "stop[0]", "not be empty"),
    ({"prompt": "x", "kv_transfer_params": {"a": 1}}, "kv_transfer_params", "not a field"),
    ({"prompt": "x", "surprise": 1}, "surprise", "not a field"),
    ({"prompt": "x", "surprise": None}, "surprise", "not a field"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
    ({"prompt": "x", "stream_options": {}}, "stream_options", "needs stream"),
    ({"prompt": "x", "stream": "yes"}, "stream", "boolean"),
    (
        {"prompt": "x", "stream": True, "stream_options": {"a": 1}},
        "stream_options.a",
        "not a field",
    ),
    ({"prompt": "x", "structured_outputs": {"regex": 1}}, "structured_outputs.regex", "string"),
    ({"prompt": "x", "request_id": "a b"}, "request_id", "128 characters"),
]


@pytest.mark.parametrize("body, param, words", BAD)
async def test_bad_bodies(
    http: aiohttp.ClientSession, body: dict[str, Any], param: str, words: str
) -> None:
    async with http.post("/v1/completions", json={"model": MODEL, **body}) as reply:
        error = (await reply.json())["error"]
        assert reply.status == 400
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content, words",
    [(b"{", "not JSON"), (b"[1]", "object"), (b"", "not JSON"), (b"\xff\xfe", "not JSON")],
)
async def test_bodies_that_are_no_object(
    http: aiohttp.ClientSession, content: bytes, words: str
) -> None:
    async with http.post("/v1/chat/completions", data=content) as reply:
        assert reply.status == 400
        assert words in (await reply.json())["error"]["message"]


async def test_other_errors_have_the_same_shape(http: aiohttp.ClientSession) -> None:
    big = {"model": MODEL, "prompt": "x" * 70_000}
    async with http.post("/v1/completions", json=big) as reply:
        assert reply.status == 413
        assert "65536" in (await reply.json())["error"]["message"]
    async with http.get("/v1/completions") as reply:
        assert reply.status == 405
        assert (await reply.json())["error"]["code"] == "method_not_allowed"
    async with http.get("/v2/nothing") as reply:
        assert reply.status == 404
        assert (await reply.json())["error"]["code"] == "not_found"


async def test_a_bug_shows_nothing_but_a_reference(
    cluster: Cluster, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(cluster.router._catalog, "limits", broken)
    async with http.post("/v1/completions", json={"model": MODEL, "prompt": "x"}) as reply:
        assert reply.status == 500
        text = await reply.text()
    assert "secret" not in text and "Traceback" not in text
    assert "reference" in text


async def test_health_readiness_and_metrics(
    cluster: Cluster, http: aiohttp.ClientSession, client: openai.AsyncOpenAI
) -> None:
    await client.completions.create(model=MODEL, prompt="hi", max_tokens=3)
    async with http.get("/healthz") as reply:
        assert reply.status == 200
    async with http.get("/readyz") as reply:
        assert reply.status == 200
    async with http.get("/metrics") as reply:
        text = await reply.text()
    for line in (
        f'pdserve_requests_total{{model="{MODEL}",status="OK"}} 1.0',
        f'pdserve_request_tokens_total{{kind="completion",model="{MODEL}"}} 3.0',
        f'pdserve_ttft_seconds_count{{model="{MODEL}"}} 1.0',
        'pdserve_phase_seconds_count{phase="handoff_wait"} 1.0',
        'pdserve_handoff_bytes_total{transport="grpc"} 4096.0',
        "pdserve_running_requests 0.0",
        f'pdserve_workers{{model="{MODEL}",role="decode",state="ready"}} 1.0',
        "pdserve_store_reachable 1.0",
    ):
        assert line in text


async def test_not_ready_says_what_is_missing() -> None:
    cluster = Cluster()
    await cluster.router.start()
    try:
        async with aiohttp.ClientSession(cluster.url) as http, http.get("/readyz") as reply:
            assert reply.status == 503
            reason = (await reply.json())["reason"]
        assert "no ready prefill worker and no ready decode worker" in reason
    finally:
        await cluster.stop()


async def test_a_failure_before_the_first_token_has_its_status(
    cluster: Cluster, client: openai.AsyncOpenAI
) -> None:
    cluster.decode.gate.clear()
    fail_with(cluster.prefill, worker_pb2.SequenceError(code=3, message="bad grammar"))
    with pytest.raises(openai.BadRequestError, match="bad grammar"):
        await client.completions.create(model=MODEL, prompt="hi", max_tokens=3, stream=True)


async def test_a_failure_in_the_middle_ends_the_stream_with_an_error(
    cluster: Cluster, client: openai.AsyncOpenAI
) -> None:
    async def breaks(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        send(token_output(start, 0))
        send(token_output(start, 1))
        await worker.gate.wait()
        send(error_output(start, worker_pb2.SequenceError(code=14, message="gone")))

    cluster.decode.script = breaks
    cluster.decode.gate.clear()
    stream = await client.completions.create(model=MODEL, prompt="hi", max_tokens=5, stream=True)
    text = ""
    with pytest.raises(openai.APIError, match="gone"):
        async for chunk in stream:
            text += chunk.choices[0].text
            cluster.decode.gate.set()
    assert text == "t0 t1 "


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels(cluster: Cluster, stream: bool) -> None:
    cluster.decode.gate.clear()
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 5, "stream": stream}
    async with aiohttp.ClientSession(cluster.url) as http:
        post = asyncio.create_task(_post(http, body))
        await asyncio.wait_for(cluster.decode.started.get(), TIMEOUT)
        post.cancel()
        await asyncio.wait({post})
    await asyncio.wait_for(cluster.decode.cancelled.get(), TIMEOUT)


async def test_the_timeout_header(cluster: Cluster, http: aiohttp.ClientSession) -> None:
    async def silent(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        await asyncio.Event().wait()

    cluster.prefill.script = cluster.decode.script = silent
    body = {"model": MODEL, "prompt": "hi"}
    headers = {"X-Request-Timeout-Seconds": "0.2"}
    async with http.post("/v1/completions", json=body, headers=headers) as reply:
        assert reply.status == 504
        assert (await reply.json())["error"]["type"] == "timeout_error"
    for no_time in ("soon", "nan", "0", "1e307"):
        headers = {"X-Request-Timeout-Seconds": no_time}
        async with http.post("/v1/completions", json=body, headers=headers) as reply:
            assert reply.status == 400


async def test_a_body_has_to_come_before_the_deadline(cluster: Cluster) -> None:
    host, _, port = cluster.router.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
    writer.write(head + b"X-Request-Timeout-Seconds: 0.2\r\n\r\n{")
    said = await asyncio.wait_for(reader.readline(), TIMEOUT)
    writer.close()
    assert said.startswith(b"HTTP/1.1 504 ")


async def test_a_slow_reader_is_cut_off(cluster: Cluster) -> None:
    async def flood(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        for i in range(start.sampling.max_tokens):
            output = token_output(start, i)
            output.text = "x" * 2000 if i else "t0 "
            send(output)
            if i % 64 == 0:
                await asyncio.sleep(0)

    cluster.decode.script = flood
    host, port = cluster.router.http_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 19_000, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write((head + body).encode())
    await asyncio.wait_for(cluster.decode.cancelled.get(), TIMEOUT)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(100_000_000)
    writer.close()


async def _post(http: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    async with http.post("/v1/completions", json=body) as reply:
        await reply.read()


def error_output(
    start: worker_pb2.StartSequence, error: worker_pb2.SequenceError
) -> worker_pb2.SequenceOutput:
    return worker_pb2.SequenceOutput(
        sequence_id=start.sequence_id,
        finish_reason=common_pb2.FINISH_REASON_ERROR,
        error=error,
    )


def fail_with(failing: FakeWorker, error: worker_pb2.SequenceError) -> None:
    async def fails(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        send(error_output(start, error))

    failing.script = fails
