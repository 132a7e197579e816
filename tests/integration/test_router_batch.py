"""Batch jobs over two routers, one real Valkey and scripted workers, by both protocols."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest

from cluster.cli.access import channel
from cluster.store.embedded import EmbeddedStore
from pdserve.v1 import batch_pb2, batch_pb2_grpc
from tests.integration.router_fakes import MODEL
from tests.integration.test_router_grpc import TIMEOUT, ask, collect, tokens_of
from tests.integration.test_router_resume import (
    TOKENS,
    Pair,
    running,
    slowly,
    store,  # noqa: F401
)

ENDPOINT = "/v1/completions"
JOB_SECONDS = 60.0


@pytest.fixture
async def pair(store: EmbeddedStore) -> AsyncIterator[Pair]:  # noqa: F811
    async with running(store) as pair:
        yield pair


def line(i: int, **body: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": f"line {i}", "max_tokens": 3, **body}
    return {"custom_id": f"id-{i}", "method": "POST", "url": ENDPOINT, "body": body}


def content(*lines: Any) -> bytes:
    return "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines).encode()


async def submit(
    pair: Pair, data: bytes, router: int = 0, endpoint: str = ENDPOINT, metadata: Any = ()
) -> batch_pb2.BatchJob:
    async def parts() -> AsyncIterator[batch_pb2.SubmitBatchRequest]:
        header = batch_pb2.BatchHeader(endpoint=endpoint, metadata={"who": "tests"})
        yield batch_pb2.SubmitBatchRequest(header=header)
        for start in range(0, len(data), 1000):
            yield batch_pb2.SubmitBatchRequest(content=data[start : start + 1000])

    job: batch_pb2.BatchJob = await jobs(pair, router).Submit(
        parts(), timeout=TIMEOUT, metadata=metadata
    )
    return job


def jobs(pair: Pair, router: int) -> Any:
    return batch_pb2_grpc.BatchStub(pair.channels[router])


async def results(pair: Pair, batch_id: str, router: int = 0) -> list[dict[str, Any]]:
    """All of them, once the job has ended."""
    request = batch_pb2.BatchResultsRequest(batch_id=batch_id)
    call = jobs(pair, router).Results(request, timeout=JOB_SECONDS)
    return [json.loads(result.json) async for result in call]


async def test_a_job_is_served_by_both_routers_each_line_once(pair: Pair) -> None:
    # Long enough to be worked on for a while, so that both get something of it.
    pair.fakes.decode.script = slowly
    job = await submit(pair, content(*(line(i) for i in range(300))))
    assert (job.state, job.total, job.metadata["who"]) == ("in_progress", 300, "tests")
    done = await results(pair, job.batch_id, router=1)
    assert Counter(r["custom_id"] for r in done) == Counter(f"id-{i}" for i in range(300))
    assert all(r["response"]["body"]["choices"][0]["text"] == "t0 t1 t2 " for r in done)
    assert all(r["response"]["body"]["usage"]["completion_tokens"] == 3 for r in done)
    assert pair.executions == 300
    ended = await jobs(pair, 1).Get(
        batch_pb2.GetBatchRequest(batch_id=job.batch_id), timeout=TIMEOUT
    )
    assert (ended.state, ended.completed, ended.failed) == ("completed", 300, 0)
    listed = await jobs(pair, 0).List(batch_pb2.ListBatchesRequest(), timeout=TIMEOUT)
    assert [j.batch_id for j in listed.jobs] == [job.batch_id]


async def test_bad_lines_have_their_own_errors_and_the_rest_is_served(pair: Pair) -> None:
    bad = [
        "{",
        line(1, max_tokens=-1),
        line(0),  # its id is taken
        line(2, model="other"),
        {**line(3), "url": "/v1/chat/completions"},
        line(4, prompt="x" * 30_000),
        line(5, stream=True),
        line(6, echo=True),
    ]
    job = await submit(pair, content(line(0), *bad, line(9)))
    done = await results(pair, job.batch_id)
    assert len(done) == 10
    good = [r for r in done if r["error"] is None]
    assert sorted(r["custom_id"] for r in good) == ["id-0", "id-9"]
    by_line = {r["error"]["line"]: r for r in done if r["error"]}
    assert sorted(by_line) == list(range(2, 10))
    statuses = [by_line[n]["response"]["status_code"] for n in sorted(by_line)]
    assert statuses == [400, 400, 400, 404, 400, 400, 400, 400]
    params = [by_line[n]["error"]["param"] for n in (3, 4, 7, 9)]
    assert params == ["max_tokens", "custom_id", "prompt", "echo"]


async def test_a_router_dies_in_the_middle(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.batch.runner.LEASE_SECONDS", 2.0)
    pair.fakes.decode.script = slowly
    job = await submit(pair, content(*(line(i) for i in range(400))))
    while pair.executions < 200:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await pair.kill(0)
    done = await results(pair, job.batch_id, router=1)
    assert Counter(r["custom_id"] for r in done) == Counter(f"id-{i}" for i in range(400))
    assert all(r["error"] is None for r in done)


async def test_a_router_that_stops_gives_its_pages_back(pair: Pair) -> None:
    pair.fakes.decode.gate.clear()
    job = await submit(pair, content(*(line(i) for i in range(64))))
    while pair.executions < 64:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await pair.routers[0].stop(0)
    pair.fakes.decode.gate.set()
    done = await results(pair, job.batch_id, router=1)
    assert Counter(r["custom_id"] for r in done) == Counter(f"id-{i}" for i in range(64))


async def test_cancel(pair: Pair) -> None:
    pair.fakes.decode.gate.clear()
    job = await submit(pair, content(*(line(i) for i in range(400))))
    while not pair.executions:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    request = batch_pb2.CancelBatchRequest(batch_id=job.batch_id)
    assert (await jobs(pair, 1).Cancel(request, timeout=TIMEOUT)).state == "cancelling"
    assert await results(pair, job.batch_id) == []
    ended = await jobs(pair, 0).Cancel(request, timeout=TIMEOUT)
    assert (ended.state, ended.completed) == ("cancelled", 0)
    pair.fakes.decode.gate.set()
    assert tokens_of(await collect(pair.stub(0).Generate(ask(), timeout=TIMEOUT)))


async def test_online_work_goes_first_and_the_job_goes_on_after_it(
    store: EmbeddedStore,  # noqa: F811
) -> None:
    pair = Pair(store)
    router = pair.config.router.model_copy(update={"max_running_requests": 4})
    pair.config = pair.config.model_copy(update={"router": router})
    pair.routers = [pair.new_router("r-0")]
    await pair.start()
    try:
        pair.fakes.decode.gate.clear()
        job = await submit(pair, content(*(line(i) for i in range(16))))
        while pair.executions < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        # 80 % of four are batch's at most; the online requests take those places too.
        calls = [pair.stub(0).Generate(ask(), timeout=TIMEOUT) for _ in range(4)]
        for call in calls:
            await call.read()
        pair.fakes.decode.gate.set()
        for call in calls:
            assert (await collect(call))[-1].HasField("completed")
        done = await results(pair, job.batch_id)
        assert Counter(r["custom_id"] for r in done) == Counter(f"id-{i}" for i in range(16))
        texts = {r["response"]["body"]["choices"][0]["text"] for r in done}
        assert texts == {"t0 t1 t2 "}
    finally:
        await pair.stop()


async def test_openais_client(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://{pair.routers[0].http_address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        data = content(line(0), "nonsense", line(2))
        file = await client.files.create(file=("in.jsonl", data), purpose="batch")
        assert (file.bytes, file.filename, file.purpose) == (len(data), "in.jsonl", "batch")
        assert (await client.files.content(file.id)).text == data.decode() + "\n"
        pair.fakes.decode.gate.clear()
        batch = await client.batches.create(
            input_file_id=file.id,
            endpoint=ENDPOINT,
            completion_window="24h",
            metadata={"a": "b"},
        )
        assert (batch.status, batch.input_file_id) == ("in_progress", file.id)
        # The file goes; the job has a copy of its own.
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        pair.fakes.decode.gate.set()
        async with asyncio.timeout(JOB_SECONDS):
            while (batch := await client.batches.retrieve(batch.id)).status != "completed":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        assert batch.output_file_id and batch.error_file_id
        output = (await client.files.content(batch.output_file_id)).text.splitlines()
        assert sorted(json.loads(each)["custom_id"] for each in output) == ["id-0", "id-2"]
        (failed,) = (await client.files.content(batch.error_file_id)).text.splitlines()
        assert json.loads(failed)["error"]["line"] == 2
        listed = await client.batches.list(limit=1)
        assert [b.id for b in listed.data] == [batch.id]
        assert (await client.batches.cancel(batch.id)).status == "completed"
        with pytest.raises(openai.BadRequestError, match="no file of yours"):
            await client.batches.create(
                input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h"
            )
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await client.files.create(file=("x", b"{}"), purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="lines"):
            await client.files.create(file=("x", b"\n"), purpose="batch")


async def test_a_hundred_thousand_lines_are_taken_in(pair: Pair) -> None:
    pair.fakes.decode.gate.clear()
    data = content(*(line(i) for i in range(100_000)))
    job = await submit(pair, data)
    assert (job.total, job.failed) == (100_000, 0)
    assert pair.executions < 1000  # nobody takes more than a little of it in hand
    more = content(line(100_001))
    with pytest.raises(grpc.aio.AioRpcError, match="100000 lines") as refused:
        await submit(pair, data + b"\n" + more)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await jobs(pair, 0).Cancel(batch_pb2.CancelBatchRequest(batch_id=job.batch_id), timeout=TIMEOUT)


async def test_bad_jobs(pair: Pair) -> None:
    for data, endpoint, words in (
        (b"", ENDPOINT, "1 to 100000 lines"),
        (content(line(0)), "/v1/embeddings", "endpoint"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=words) as refused:
            await submit(pair, data, endpoint=endpoint)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    async def headless() -> AsyncIterator[batch_pb2.SubmitBatchRequest]:
        yield batch_pb2.SubmitBatchRequest(content=b"{}")

    with pytest.raises(grpc.aio.AioRpcError, match="header"):
        await jobs(pair, 0).Submit(headless(), timeout=TIMEOUT)
    for method, request in (
        ("Get", batch_pb2.GetBatchRequest(batch_id="none")),
        ("Cancel", batch_pb2.CancelBatchRequest(batch_id="none")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(jobs(pair, 0), method)(request, timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    async with aiohttp.ClientSession(f"http://{pair.routers[0].http_address}") as http:
        for path, status in (("/v1/batches/none", 404), ("/v1/files/none/content", 404)):
            async with http.get(path) as reply:
                assert reply.status == status
        async with http.post("/v1/files", data=b"{}") as reply:
            assert reply.status == 400
        async with http.post("/v1/batches", json={"input_file_id": "x", "enpoint": "y"}) as reply:
            assert reply.status == 400


async def test_jobs_are_their_tenants(
    store: EmbeddedStore,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = {**TOKENS, "third": "token-of-the-third-tenant"}
    for name, token in tokens.items():
        (tmp_path / name).write_text(token)
    tenants = [
        {"name": "first", "token_file": str(tmp_path / "first")},
        {
            "name": "second",
            "token_file": str(tmp_path / "second"),
            "classes": ["interactive", "standard"],
        },
        {"name": "third", "token_file": str(tmp_path / "third"), "limits": {"batch_jobs": 1}},
    ]

    def of(name: str) -> Any:
        return (("authorization", f"Bearer {tokens[name]}"),)

    async with running(store, tenants=tenants) as pair:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await submit(pair, content(line(0)))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await submit(pair, content(line(0)), metadata=of("second"))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        pair.fakes.decode.gate.clear()
        await submit(pair, content(line(0)), metadata=of("third"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await submit(pair, content(line(0)), router=1, metadata=of("third"))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "tenants.third.limits.batch_jobs" in (refused.value.details() or "")
        pair.fakes.decode.gate.set()
        job = await submit(pair, content(line(0)), metadata=of("first"))
        monkeypatch.setenv("PDSERVE_TOKEN", TOKENS["first"])
        async with channel(pair.routers[0].grpc_address) as command_lines:
            pair.channels.append(command_lines)
            shown = await submit(pair, content(line(0)), router=2)
            assert shown.state == "in_progress"
        request = batch_pb2.GetBatchRequest(batch_id=job.batch_id)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await jobs(pair, 1).Get(request, timeout=TIMEOUT, metadata=of("second"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        follow = batch_pb2.BatchResultsRequest(batch_id=job.batch_id)
        call = jobs(pair, 1).Results(follow, timeout=JOB_SECONDS, metadata=of("first"))
        assert len([result async for result in call]) == 1


async def test_the_command_line(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content(line(0), "nonsense"))
    address = pair.routers[0].grpc_address
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    async def pdserve(*args: str) -> tuple[int | None, str, str]:
        code = "from cluster.cli.main import main; main()"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, "batch", *args, "--address", address,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
        )  # fmt: skip
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    file = str(tmp_path / "in.jsonl")
    status, out, err = await pdserve("submit", file, "--endpoint", ENDPOINT, "--json")
    assert status == 0, err
    job = json.loads(out)
    assert (job["total"], job["failed"]) == (2, 1)
    status, out, _ = await pdserve("results", job["batch_id"])
    assert status == 1  # a line failed
    assert {json.loads(each)["custom_id"] for each in out.splitlines()} == {"id-0", ""}
    status, out, _ = await pdserve("get", job["batch_id"], "--json")
    assert (status, json.loads(out)["state"]) == (0, "completed")
    status, out, _ = await pdserve("list")
    assert (status, job["batch_id"] in out) == (0, True)
    status, _, err = await pdserve("cancel", "none")
    assert (status, "there is no batch none" in err) == (1, True)
    status, _, err = await pdserve("submit", str(tmp_path / "missing"))
    assert (status, "cannot be read" in err) == (1, True)
