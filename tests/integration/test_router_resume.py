"""Idempotency keys and Resume: two routers, one real Valkey, scripted workers, and what may break
in between. The scripted model's only completion is 10, 11, 12 … with the text "t0 t1 t2 …"."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from cluster.store.client import connect
from cluster.store.embedded import EmbeddedStore
from cluster.store.registry import Registry
from cluster.store.streams import Holder, StreamHead, StreamName, Streams
from pdserve.v1 import inference_pb2, inference_pb2_grpc, worker_pb2
from router.server import RouterServer
from router.tokenize import Tokenizer
from tests.integration.router_fakes import (
    MODEL,
    SECRET,
    Cluster,
    FakeWorker,
    Letters,
    Send,
    token_output,
)
from tests.integration.test_router_grpc import TIMEOUT, ask, collect, refusal, tokens_of

TOKENS = {"first": "token-of-the-first-tenant", "second": "token-of-the-second-one"}
COUNT = 8


class Pair:
    """Two routers that share a store and the fakes' workers."""

    def __init__(self, store: EmbeddedStore, tenants: Any = (), **resume: Any) -> None:
        self.store = store
        self.fakes = Cluster(tenants=tenants)
        config = self.fakes.config
        resume = {"grace_seconds": 20, **resume}
        self.config = config.model_copy(
            update={
                "resume": config.resume.model_copy(update=resume),
                "store": config.store.model_copy(update={"lease_seconds": 1.0}),
            }
        )
        self.routers = [self.new_router(f"r-{i}") for i in range(2)]
        self.channels: list[grpc.aio.Channel] = []

    def new_router(self, router_id: str) -> RouterServer:
        tokenizers = {MODEL: Tokenizer(Letters())}
        return RouterServer(
            self.config, router_id, f"{router_id}-life", SECRET, self.store.url,
            tokenizers=tokenizers,
        )  # fmt: skip

    async def start(self) -> None:
        self.client = await connect(self.store.url, 30.0)
        registry = Registry(self.client, self.config.name)
        for worker in self.fakes.workers:
            await worker.serve()
            await registry.put_worker(worker.record, lease_seconds=600)
        for router in self.routers:
            await router.start()
            await router.wait_ready(TIMEOUT)
            self.channels.append(grpc.aio.insecure_channel(router.grpc_address))

    def stub(self, router: int) -> Any:
        return inference_pb2_grpc.InferenceStub(self.channels[router])

    async def kill(self, router: int) -> None:
        """As a SIGKILL would: nothing of it says goodbye, its lease runs out."""
        dead = self.routers[router]
        assert dead._background._task is not None
        dead._background._task.cancel()
        for stream in dead._resumption._known.values():
            assert stream.task is not None
            stream.task.cancel()
        await dead._ports.clients.stop(None)

    async def stop(self) -> None:
        for channel in self.channels:
            await channel.close()
        for router in self.routers:
            with contextlib.suppress(Exception):
                await router.stop(0)
        for worker in self.fakes.workers:
            await worker.die()
        await self.client.aclose()

    @property
    def executions(self) -> int:
        return self.fakes.prefill.started.qsize()


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = EmbeddedStore.start(tmp_path)
    yield store
    store.stop()


@contextlib.asynccontextmanager
async def running(store: EmbeddedStore, **settings: Any) -> AsyncIterator[Pair]:
    pair = Pair(store, **settings)
    await pair.start()
    try:
        yield pair
    finally:
        await pair.stop()


@pytest.fixture
async def pair(store: EmbeddedStore) -> AsyncIterator[Pair]:
    async with running(store) as pair:
        yield pair


def keyed(key: str, text: str = "hi", **sampling: Any) -> inference_pb2.GenerateRequest:
    request = ask(text, **{"max_tokens": COUNT, **sampling})
    request.idempotency_key = key
    return request


def resumable(request_id: str, **sampling: Any) -> inference_pb2.GenerateRequest:
    request = ask(**{"max_tokens": COUNT, **sampling})
    request.request_id = request_id
    request.resumable = True
    return request


def resume(request_id: str, *offsets: int) -> inference_pb2.ResumeRequest:
    return inference_pb2.ResumeRequest(request_id=request_id, next_offset=offsets)


def merged(
    messages: list[Any], known_tokens: int = 0, known_text: str = ""
) -> tuple[list[int], str]:
    """What a client has that knew so much before, using the offsets of tokens and text."""
    tokens, text = list(range(10, 10 + known_tokens)), known_text
    for message in messages:
        if message.HasField("delta"):
            delta = message.delta
            assert delta.offset == len(tokens)
            tokens += delta.token_ids
            assert delta.text_offset <= len(text)
            text += delta.text[len(text) - delta.text_offset :]
    return tokens, text


ALL = list(range(10, 10 + COUNT))
ALL_TEXT = "".join(f"t{i} " for i in range(COUNT))


async def slowly(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
    """A token at a time, the second half of them as soon as the gate is open."""
    for i in range(start.sampling.max_tokens):
        if i >= start.sampling.max_tokens // 2:
            await worker.gate.wait()
        send(token_output(start, i))
        await asyncio.sleep(0.04)


async def some(call: Any, count: int) -> list[Any]:
    messages = []
    while len(tokens_of(messages)) < count:
        messages.append(await call.read())
    return messages


async def test_racing_repetitions_run_once(pair: Pair) -> None:
    calls = [
        pair.stub(i % 2).Generate(keyed("k", temperature=1), timeout=TIMEOUT) for i in range(12)
    ]
    answers = await asyncio.gather(*map(collect, calls))
    assert pair.executions == 1
    assert {tuple(tokens_of(messages)) for messages in answers} == {tuple(ALL)}
    assert len({messages[-1].request_id for messages in answers}) == 1
    assert all(messages[-1].HasField("completed") for messages in answers)


async def test_a_repetition_joins_and_later_ones_replay(pair: Pair) -> None:
    pair.fakes.decode.gate.clear()
    first = pair.stub(0).Generate(keyed("k"), timeout=TIMEOUT)
    await first.read()
    joined = [pair.stub(i).Generate(keyed("k"), timeout=TIMEOUT) for i in range(2)]
    assert [(await call.read()).delta.token_ids for call in joined] == [[10], [10]]
    pair.fakes.decode.gate.set()
    for call in (first, *joined):
        await collect(call)
    for i in range(2):
        messages = await collect(pair.stub(i).Generate(keyed("k"), timeout=TIMEOUT))
        assert merged(messages) == (ALL, ALL_TEXT)
        report = messages[-1].completed.completions[0]
        assert (report.prefill_worker, report.handoff.bytes) == ("p-0", 4096)
    assert pair.executions == 1


async def test_repetitions_under_the_same_id_run_once_too(pair: Pair) -> None:
    """As a client sends a request again that its own library has already given an id."""

    def again(router: int) -> Any:
        request = keyed("k", temperature=1)
        request.request_id = "mine"
        return pair.stub(router).Generate(request, timeout=TIMEOUT)

    answers = await asyncio.gather(*(collect(again(i % 2)) for i in range(6)))
    answers += [await collect(again(i)) for i in range(2)]
    assert [merged(messages) for messages in answers] == [(ALL, ALL_TEXT)] * 8
    assert pair.executions == 1


async def test_a_call_that_ends_while_it_claims_leaves_its_key_usable(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, claimed, answer = Streams.claim, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> Any:
        holder = await claim(*args)
        claimed.set()
        await answer.wait()
        return holder

    monkeypatch.setattr(Streams, "claim", slow)
    call = pair.stub(0).Generate(keyed("k"), timeout=TIMEOUT)
    await claimed.wait()
    call.cancel()
    async with asyncio.timeout(TIMEOUT):
        while not pair.routers[0]._resumption._claims._left:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        answer.set()
        while await pair.client.keys("*:stream-key:*"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    for router in (1, 0):
        messages = await collect(pair.stub(router).Generate(keyed("k"), timeout=TIMEOUT))
        assert merged(messages) == (ALL, ALL_TEXT)
    assert pair.executions == 1


@pytest.mark.parametrize("key", ["", "k"])
async def test_a_claim_whose_answer_was_lost_is_had_again(pair: Pair, key: str) -> None:
    streams, name = Streams(pair.client, "c"), StreamName("t", "r", key)

    async def claim(mark: str) -> Holder:
        return await streams.claim(name, "{}", "f", "r-0 life", mark, 60, 1.0)

    assert [await claim("first") for _ in range(2)] == [Holder("r", True)] * 2
    assert await claim("second") == Holder("r" if key else "", False)
    await streams.forget(name, "r-0 life", "second")
    assert await claim("third") == Holder("r" if key else "", False)
    await streams.finish(name, "r-0 life", '{"error":[14,"no"]}', 60)
    assert await claim("fourth") == Holder("r", True)
    head = StreamHead("{}", "f", "r-0 life", "")
    takes = [await streams.take_over(name, head, f"r-{i} life", f"{i}") for i in (1, 1, 2)]
    assert takes == [True, True, False]  # the second time its answer had been lost
    head = await streams.head(name)  # type: ignore[assignment]
    assert await streams.take_over(name, head, "r-1 life", "1")
    assert head.owner == "r-1 life"


async def test_a_key_stands_for_one_request(pair: Pair) -> None:
    await collect(pair.stub(0).Generate(keyed("k"), timeout=TIMEOUT))
    for other in (keyed("k", "other"), keyed("k", temperature=0.5)):
        code, message, (detail,) = await refusal(pair.stub(1).Generate(other, timeout=TIMEOUT))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert detail.field_violations[0].field == "idempotency_key"
        assert "another request" in message


@pytest.mark.parametrize("key", ["x" * 257, "x" * (1 << 20), "a\nb"])
async def test_impossible_keys(pair: Pair, key: str) -> None:
    code, message, (detail,) = await refusal(pair.stub(0).Generate(keyed(key), timeout=TIMEOUT))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert detail.field_violations[0].field == "idempotency_key"
    assert len(message) < 200


async def test_a_refused_request_frees_its_key(pair: Pair) -> None:
    async def fail(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        error = worker_pb2.SequenceError(code=3, message="no", retryable=False)
        send(worker_pb2.SequenceOutput(sequence_id=start.sequence_id, finish_reason=4, error=error))

    script = pair.fakes.prefill.script
    pair.fakes.prefill.script = pair.fakes.decode.script = fail
    code, _, _ = await refusal(pair.stub(0).Generate(keyed("k"), timeout=TIMEOUT))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    pair.fakes.prefill.script = pair.fakes.decode.script = script
    messages = await collect(pair.stub(1).Generate(keyed("k"), timeout=TIMEOUT))
    assert tokens_of(messages) == ALL


async def test_resume_at_every_offset_on_both_routers(pair: Pair) -> None:
    await collect(pair.stub(0).Generate(resumable("r", n=2, logprobs=1), timeout=TIMEOUT))
    for router in range(2):
        for offset in range(COUNT + 1):
            call = pair.stub(router).Resume(resume("r", offset), timeout=TIMEOUT)
            messages = await collect(call)
            mine = [m for m in messages if m.HasField("delta") and m.delta.index == 0]
            known = "".join(f"t{i} " for i in range(offset))
            assert merged(mine, offset, known) == (ALL, ALL_TEXT)
            assert sum(len(m.delta.logprobs) for m in mine) == COUNT - offset
            assert mine[-1].delta.finish_reason == 2
            assert tokens_of(messages, 1) == ALL
            assert messages[-1].completed.usage.completion_tokens == 2 * COUNT
    assert pair.executions == 2


async def test_a_broken_connection_is_resumed_while_the_request_runs(pair: Pair) -> None:
    pair.fakes.decode.script = slowly
    for router in range(2):
        pair.fakes.decode.gate.clear()
        request_id = f"r{router}"
        call = pair.stub(0).Generate(resumable(request_id), timeout=TIMEOUT)
        got = merged(await some(call, 3))
        call.cancel()
        again = pair.stub(router).Resume(resume(request_id, len(got[0])), timeout=TIMEOUT)
        reading = asyncio.create_task(collect(again))
        await asyncio.sleep(0.2)
        pair.fakes.decode.gate.set()
        assert merged(await reading, len(got[0]), got[1]) == (ALL, ALL_TEXT)
    assert pair.executions == 2
    assert pair.fakes.decode.cancelled.empty()


async def test_nobody_comes_back(store: EmbeddedStore) -> None:
    async with running(store, grace_seconds=0.1) as pair:
        pair.fakes.decode.gate.clear()
        call = pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT)
        await call.read()
        call.cancel()
        await asyncio.wait_for(pair.fakes.decode.cancelled.get(), TIMEOUT)
        code, _, _ = await refusal(pair.stub(1).Resume(resume("r", 1), timeout=TIMEOUT))
        assert code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"seed": 5, "stop": ["zz"]}])
async def test_a_router_dies_and_another_goes_on(pair: Pair, sampling: dict[str, Any]) -> None:
    pair.fakes.decode.script = slowly
    pair.fakes.decode.gate.clear()
    call = pair.stub(0).Generate(resumable("r", **sampling), timeout=TIMEOUT)
    got = merged(await some(call, 3))
    await pair.kill(0)
    again = pair.stub(1).Resume(resume("r", len(got[0])), timeout=TIMEOUT)
    reading = asyncio.create_task(collect(again))
    await asyncio.sleep(1.5)
    pair.fakes.decode.gate.set()
    messages = await reading
    assert merged(messages, len(got[0]), got[1]) == (ALL, ALL_TEXT)
    assert messages[-1].completed.usage.completion_tokens == COUNT
    starts = [pair.fakes.prefill.started.get_nowait() for _ in range(2)]
    grown = len(starts[1].prompt_token_ids) - len(starts[0].prompt_token_ids)
    assert grown == 0 if "seed" in sampling else grown >= 3


async def test_two_resume_a_dead_routers_request_and_it_runs_once(pair: Pair) -> None:
    pair.fakes.decode.script = slowly
    pair.fakes.decode.gate.clear()
    call = pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT)
    await some(call, 2)
    await pair.kill(0)
    third = pair.new_router("r-2")
    pair.routers.append(third)
    await third.start()
    await third.wait_ready(TIMEOUT)
    pair.channels.append(grpc.aio.insecure_channel(third.grpc_address))
    calls = [pair.stub(i).Resume(resume("r"), timeout=TIMEOUT) for i in (1, 2, 1, 2)]
    reading = [asyncio.create_task(collect(call)) for call in calls]
    await asyncio.sleep(1.5)
    pair.fakes.decode.gate.set()
    assert {tuple(tokens_of(m)) for m in await asyncio.gather(*reading)} == {tuple(ALL)}
    assert pair.executions == 2


async def test_what_cannot_go_on_exactly_is_refused(pair: Pair) -> None:
    pair.fakes.decode.script = slowly
    pair.fakes.decode.gate.clear()
    call = pair.stub(0).Generate(resumable("r", presence_penalty=1.0), timeout=TIMEOUT)
    await some(call, 3)
    await pair.kill(0)
    code, message, _ = await refusal(pair.stub(1).Resume(resume("r", 3), timeout=TIMEOUT))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "presence penalty" in message


async def test_a_router_that_stops_leaves_its_requests_to_the_others(pair: Pair) -> None:
    pair.fakes.decode.script = slowly
    pair.fakes.decode.gate.clear()
    call = pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT)
    got = merged(await some(call, 3))
    await pair.routers[0].stop(0)
    pair.fakes.decode.gate.set()
    again = pair.stub(1).Resume(resume("r", len(got[0])), timeout=TIMEOUT)
    assert merged(await collect(again), len(got[0]), got[1]) == (ALL, ALL_TEXT)


async def test_a_router_that_was_frozen_cannot_write_any_more(pair: Pair) -> None:
    pair.fakes.decode.script = slowly
    pair.fakes.decode.gate.clear()
    call = pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT)
    got = await some(call, 2)
    key = f"pdserve:{{{pair.config.name}}}:stream:default/r"
    await pair.client.hset(key, "owner", "r-1 r-1-life")
    pair.fakes.decode.gate.set()
    code, message, _ = await refusal(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "another router" in message
    assert len(tokens_of(got)) < COUNT


async def test_a_stream_that_the_store_has_lost_goes_on(pair: Pair) -> None:
    pair.fakes.decode.script = slowly
    pair.fakes.decode.gate.clear()
    call = pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT)
    got = await some(call, 2)
    keys = [f"pdserve:{{{pair.config.name}}}:{kind}:default/r" for kind in ("stream", "stream-log")]
    assert await pair.client.delete(*keys) == 2  # as a store does that comes back empty
    resumed = pair.stub(0).Resume(resume("r"), timeout=TIMEOUT)
    again = await some(resumed, 1)
    pair.fakes.decode.gate.set()
    got += await collect(call)
    again += await collect(resumed)
    assert tokens_of(got) == tokens_of(again) == ALL
    assert not await pair.client.exists(*keys)


@pytest.mark.parametrize("lose", ["delete", "rpop"])
async def test_what_the_store_has_lost_of_a_stream_is_not_passed_over(
    pair: Pair, lose: str
) -> None:
    await collect(pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT))
    log = f"pdserve:{{{pair.config.name}}}:stream-log:default/r"
    assert await getattr(pair.client, lose)(log)
    code, message, _ = await refusal(pair.stub(1).Resume(resume("r"), timeout=TIMEOUT))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "expired" in message


async def test_without_the_store(pair: Pair) -> None:
    pair.fakes.decode.script = slowly
    call = pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT)
    got = await some(call, 2)
    pair.store.stop()
    got += await collect(call)
    assert tokens_of(got) == ALL  # what runs goes on
    code, _, _ = await refusal(pair.stub(1).Generate(keyed("k"), timeout=TIMEOUT))
    assert code is grpc.StatusCode.UNAVAILABLE  # nothing new can be promised
    assert tokens_of(await collect(pair.stub(1).Generate(ask(), timeout=TIMEOUT)))


async def test_bad_resumes(store: EmbeddedStore) -> None:
    async with running(store) as pair:
        stub = pair.stub(1)
        await collect(pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT))
        for offsets, words in (((COUNT + 1,), "past the end"), ((0, 0), "1 at most")):
            code, message, (detail,) = await refusal(
                stub.Resume(resume("r", *offsets), timeout=TIMEOUT)
            )
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert detail.field_violations[0].field == "next_offset"
            assert words in message
        for request_id, status, words in (
            ("unknown", grpc.StatusCode.NOT_FOUND, "no request unknown"),
            ("no spaces", grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        ):
            code, message, _ = await refusal(stub.Resume(resume(request_id), timeout=TIMEOUT))
            assert (code, words in message) == (status, True)
        code, _, _ = await refusal(stub.Resume(resume("r")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT  # no deadline
        await collect(stub.Generate(ask(), timeout=TIMEOUT))


async def test_a_finished_request_expires(store: EmbeddedStore) -> None:
    async with running(store, window_seconds=0.5) as pair:
        await collect(pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT))
        async with asyncio.timeout(TIMEOUT):
            while await pair.client.keys("*:stream:default/r"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        code, message, _ = await refusal(pair.stub(1).Resume(resume("r"), timeout=TIMEOUT))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "expired" in message


async def test_another_tenants_request_is_unknown(store: EmbeddedStore, tmp_path: Path) -> None:
    for name, token in TOKENS.items():
        (tmp_path / name).write_text(token)
    tenants = [{"name": name, "token_file": str(tmp_path / name)} for name in TOKENS]

    def of(name: str) -> Any:
        return (("authorization", f"Bearer {TOKENS[name]}"),)

    async with running(store, tenants=tenants) as pair:
        await collect(pair.stub(0).Generate(resumable("r"), timeout=TIMEOUT, metadata=of("first")))
        for router in range(2):
            code, message, _ = await refusal(
                pair.stub(router).Resume(resume("r"), timeout=TIMEOUT, metadata=of("second"))
            )
            assert code is grpc.StatusCode.NOT_FOUND
            unknown = await refusal(
                pair.stub(router).Resume(resume("q"), timeout=TIMEOUT, metadata=of("second"))
            )
            assert message.replace(" r ", " q ") == unknown[1]
        for name in TOKENS:
            messages = await collect(
                pair.stub(0).Generate(keyed("k"), timeout=TIMEOUT, metadata=of(name))
            )
            assert tokens_of(messages) == ALL
        assert pair.executions == 3


async def test_http_repetitions(pair: Pair) -> None:
    body = {"model": MODEL, "prompt": "hi", "max_tokens": COUNT}
    texts = []
    async with aiohttp.ClientSession(headers={"Idempotency-Key": "k"}) as http:
        for router in pair.routers:
            url = f"http://{router.http_address}/v1/completions"
            async with http.post(url, json=body) as reply:
                texts.append((await reply.json())["choices"][0]["text"])
            async with http.post(url, json={**body, "stream": True}) as reply:
                events = (await reply.text()).split("\n\n")[:-1]
                assert events.pop() == "data: [DONE]"
                chunks = [json.loads(event.removeprefix("data: ")) for event in events]
                texts.append("".join(c["choices"][0]["text"] for c in chunks))
            async with http.post(url, json={**body, "prompt": "other"}) as reply:
                assert reply.status == 400
                assert (await reply.json())["error"]["param"] == "Idempotency-Key"
    assert texts == [ALL_TEXT] * 4
    assert pair.executions == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repetition_ends_by_its_own_deadline(pair: Pair, stream: bool) -> None:
    pair.fakes.decode.gate.clear()
    url = f"http://{pair.routers[0].http_address}/v1/completions"
    body = {"model": MODEL, "prompt": "hi", "max_tokens": COUNT, "stream": stream}
    async with (
        aiohttp.ClientSession(headers={"Idempotency-Key": "k"}) as http,
        asyncio.TaskGroup() as tasks,
    ):
        first = tasks.create_task(text_of(http, url, body))
        await pair.fakes.prefill.started.get()
        late = {"X-Request-Timeout-Seconds": "0.3"}
        repeated = await asyncio.wait_for(text_of(http, url, body, late), TIMEOUT)
        assert "deadline_exceeded" in repeated
        pair.fakes.decode.gate.set()
        assert f"t{COUNT - 1} " in await first


async def text_of(http: Any, url: str, body: Any, headers: Any = None) -> str:
    async with http.post(url, json=body, headers=headers) as reply:
        return str(await reply.text())


@pytest.mark.parametrize("keys", [("", ""), ("a", "b")])
async def test_two_requests_may_come_under_one_http_id(pair: Pair, keys: tuple[str, str]) -> None:
    pair.fakes.decode.gate.clear()
    url = f"http://{pair.routers[0].http_address}/v1/completions"
    body = {"model": MODEL, "prompt": "hi", "max_tokens": COUNT}

    async def post(http: Any, key: str) -> tuple[int, str]:
        headers = {"Idempotency-Key": key} if key else {}
        async with http.post(url, json=body, headers=headers) as reply:
            return reply.status, reply.headers["X-Request-Id"]

    async with (
        aiohttp.ClientSession(headers={"X-Request-Id": "trace"}) as http,
        asyncio.TaskGroup() as tasks,
    ):
        first = tasks.create_task(post(http, keys[0]))
        await pair.fakes.prefill.started.get()
        second = tasks.create_task(post(http, keys[1]))
        await asyncio.wait_for(pair.fakes.prefill.started.get(), TIMEOUT)
        pair.fakes.decode.gate.set()
    assert first.result() == (200, "trace")
    assert second.result()[0] == 200
    assert second.result()[1] != "trace"


async def test_cancel_reaches_the_router_that_runs_it(store: EmbeddedStore, tmp_path: Path) -> None:
    for name, token in TOKENS.items():
        (tmp_path / name).write_text(token)
    tenants = [{"name": name, "token_file": str(tmp_path / name)} for name in TOKENS]
    async with running(store, tenants=tenants) as pair:
        first, second = ([("authorization", f"Bearer {token}")] for token in TOKENS.values())
        pair.fakes.decode.gate.clear()
        request = ask()
        request.request_id = "mine"
        call = pair.stub(0).Generate(request, timeout=TIMEOUT, metadata=first)
        await call.read()
        cancel = inference_pb2.CancelRequest(request_id="mine")
        assert not (await pair.stub(1).Cancel(cancel, timeout=TIMEOUT, metadata=second)).cancelled
        assert (await pair.stub(1).Cancel(cancel, timeout=TIMEOUT, metadata=first)).cancelled
        assert (await refusal(call))[0] is grpc.StatusCode.CANCELLED
        assert not (await pair.stub(1).Cancel(cancel, timeout=TIMEOUT, metadata=first)).cancelled
        assert await pair.client.keys("pdserve:*:cancel:*") == []
        store.stop()
        late = pair.stub(1).Cancel(cancel, timeout=TIMEOUT, metadata=first)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await late
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
