"""The gRPC face over real sockets, with scripted workers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.errors import ConfigError
from cluster.rpc.connection import Connection
from cluster.ticket import prompt_digest
from pdserve.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
    worker_pb2,
)
from tests.integration.router_fakes import (
    MODEL,
    Cluster,
    FakeWorker,
    Send,
    running_cluster,
    token_output,
)

TIMEOUT = 30.0


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        yield cluster


@pytest.fixture
async def channel(cluster: Cluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.router.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


def ask(text: str = "hi", **sampling: Any) -> inference_pb2.GenerateRequest:
    sampling.setdefault("max_tokens", 4)
    params = common_pb2.SamplingParams(**sampling)
    return inference_pb2.GenerateRequest(model=MODEL, text=text, sampling=params)


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


def tokens_of(messages: list[inference_pb2.GenerateResponse], index: int = 0) -> list[int]:
    tokens: list[int] = []
    for message in messages:
        if message.HasField("delta") and message.delta.index == index:
            assert message.delta.offset == len(tokens)
            tokens += message.delta.token_ids
    return tokens


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, list[Any]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    error = caught.value
    details = []
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            rich = status_pb2.Status.FromString(value)
            for packed in rich.details:
                kind = getattr(error_details_pb2, packed.type_url.rsplit(".", 1)[1])
                detail = kind()
                packed.Unpack(detail)
                details.append(detail)
    return error.code(), error.details() or "", details


async def test_generate(cluster: Cluster, stub: Any) -> None:
    cluster.decode.gate.clear()
    call = stub.Generate(ask(seed=5), timeout=TIMEOUT)
    first = await call.read()
    cluster.decode.gate.set()
    messages = [first, *await collect(call)]
    assert tokens_of(messages) == [10, 11, 12, 13]
    assert "".join(m.delta.text for m in messages) == "t0 t1 t2 t3 "
    assert messages[-2].delta.finish_reason == common_pb2.FINISH_REASON_LENGTH
    completed = messages[-1].completed
    assert (completed.usage.prompt_tokens, completed.usage.completion_tokens) == (3, 4)
    assert completed.usage.cached_prompt_tokens == 1
    (report,) = completed.completions
    assert (report.prefill_worker, report.decode_worker) == ("p-0", "d-0")
    assert report.handoff.bytes == 4096
    assert report.ttft_seconds > 0

    on_prefill = cluster.prefill.started.get_nowait()
    on_decode = cluster.decode.started.get_nowait()
    assert on_prefill.stage == worker_pb2.STAGE_PREFILL
    assert on_decode.stage == worker_pb2.STAGE_DECODE
    assert on_prefill.sequence_id == on_decode.sequence_id
    assert on_prefill.ticket == on_decode.ticket
    assert on_prefill.sampling == on_decode.sampling
    ticket = cluster.prefill.ticket(on_prefill)
    assert ticket.prompt_digest == prompt_digest(list(on_prefill.prompt_token_ids))
    assert (ticket.prefill_worker, ticket.decode_incarnation) == ("p-0", "d-0-life")
    assert (ticket.layout, ticket.num_tokens) == ("l", 3)


@pytest.mark.parametrize(
    ("mark", "behind"),
    [
        ({"publish_after_token_id": 11}, True),
        ({"publish_after_text": "0 t1"}, True),
        ({"publish_after_token_id": 13}, False),
        ({"publish_after_text": "</think>"}, False),
        ({}, False),
    ],
)
async def test_time_to_publish(
    cluster: Cluster, stub: Any, mark: dict[str, Any], behind: bool
) -> None:
    request = ask()
    for field, value in mark.items():
        setattr(request, field, value)
    cluster.decode.gate.clear()
    call = stub.Generate(request, timeout=TIMEOUT)
    await call.read()
    await asyncio.sleep(0.05)
    cluster.decode.gate.set()
    (report,) = (await collect(call))[-1].completed.completions
    assert report.HasField("publish_seconds") == behind
    if behind:
        assert report.publish_seconds >= report.ttft_seconds + 0.04


async def test_n_completions_with_their_own_seeds(cluster: Cluster, stub: Any) -> None:
    messages = await collect(stub.Generate(ask(n=3, seed=40), timeout=TIMEOUT))
    for index in range(3):
        assert tokens_of(messages, index) == [10, 11, 12, 13]
    assert messages[-1].completed.usage.completion_tokens == 12
    seeds = [cluster.prefill.started.get_nowait().sampling for _ in range(3)]
    assert sorted(s.seed for s in seeds) == [40, 41, 42]
    assert {s.n for s in seeds} == {1}


async def test_one_token_involves_no_decode(cluster: Cluster, stub: Any) -> None:
    messages = await collect(stub.Generate(ask(max_tokens=1), timeout=TIMEOUT))
    assert tokens_of(messages) == [10]
    assert messages[-1].completed.completions[0].decode_worker == ""
    assert cluster.prefill.started.get_nowait().ticket == b""
    assert cluster.decode.started.empty()


async def test_chat_and_token_prompts(cluster: Cluster, stub: Any) -> None:
    turn = inference_pb2.ChatMessage(role="user", content="hi")
    chat = inference_pb2.ChatPrompt(messages=[turn])
    tokenized = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat), timeout=TIMEOUT)
    assert 1 not in tokenized.token_ids
    plain = await stub.Tokenize(inference_pb2.TokenizeRequest(text="hi"), timeout=TIMEOUT)
    assert plain.token_ids[0] == 1
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5, 6]),
        sampling=common_pb2.SamplingParams(max_tokens=2),
    )
    await collect(stub.Generate(request, timeout=TIMEOUT))
    assert list(cluster.prefill.started.get_nowait().prompt_token_ids) == [5, 6]


async def test_list_models(stub: Any) -> None:
    models = (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=TIMEOUT)).models
    told = [(m.name, m.max_model_len, m.vocab_size, m.max_step_tokens, m.ready) for m in models]
    assert told == [(MODEL, 20_000, 1000, 2048, True)]
    assert [(m.plans_ahead, m.graph_tokens) for m in models] == [(True, 256)]


@pytest.mark.parametrize(
    "request_, field",
    [
        (ask(temperature=3.0), "sampling.temperature"),
        (ask(n=17), "sampling.n"),
        (ask(max_tokens=30_000), "sampling.max_tokens"),
        (inference_pb2.GenerateRequest(model=MODEL), "prompt"),
        (inference_pb2.GenerateRequest(text="x", request_id="no spaces"), "request_id"),
        (inference_pb2.GenerateRequest(text="x" * 20_000), "text"),
        (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1000])), "token_ids"),
        (inference_pb2.GenerateRequest.FromString(b"\xfa\x07\x03abc"), "request"),
        (inference_pb2.GenerateRequest.FromString(b"\x2a\x05\xfa\x07\x02ab"), "sampling"),
    ],
)
async def test_bad_requests_name_their_field(
    stub: Any, request_: inference_pb2.GenerateRequest, field: str
) -> None:
    code, message, (detail,) = await refusal(stub.Generate(request_, timeout=TIMEOUT))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert detail.field_violations[0].field == field
    assert message.startswith(f"{field}: ")


async def test_a_deadline_is_required(stub: Any) -> None:
    code, message, (detail,) = await refusal(stub.Generate(ask()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert detail.field_violations[0].field == "deadline"
    assert "timeout" in message


async def test_unknown_model(stub: Any) -> None:
    request = inference_pb2.GenerateRequest(model="other", text="x")
    code, message, _ = await refusal(stub.Generate(request, timeout=TIMEOUT))
    assert code is grpc.StatusCode.NOT_FOUND
    assert MODEL in message


async def test_a_running_request_id_is_not_taken_twice(cluster: Cluster, stub: Any) -> None:
    cluster.decode.gate.clear()
    request = ask()
    request.request_id = "mine"
    first = stub.Generate(request, timeout=TIMEOUT)
    await first.read()
    code, _, (detail,) = await refusal(stub.Generate(request, timeout=TIMEOUT))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert detail.field_violations[0].field == "request_id"
    cluster.decode.gate.set()
    await collect(first)
    await collect(stub.Generate(request, timeout=TIMEOUT))


async def test_cancel_rpc(cluster: Cluster, stub: Any) -> None:
    cluster.decode.gate.clear()
    request = ask()
    request.request_id = "mine"
    call = stub.Generate(request, timeout=TIMEOUT)
    await call.read()
    cancel = inference_pb2.CancelRequest(request_id="mine")
    assert (await stub.Cancel(cancel, timeout=TIMEOUT)).cancelled
    code, _, _ = await refusal(call)
    assert code is grpc.StatusCode.CANCELLED
    await asyncio.wait_for(cluster.decode.cancelled.get(), TIMEOUT)
    assert not (await stub.Cancel(cancel, timeout=TIMEOUT)).cancelled


async def test_a_client_that_leaves_cancels(cluster: Cluster, stub: Any) -> None:
    cluster.decode.gate.clear()
    call = stub.Generate(ask(), timeout=TIMEOUT)
    await call.read()
    call.cancel()
    cancelled = await asyncio.wait_for(cluster.decode.cancelled.get(), TIMEOUT)
    assert cancelled == cluster.decode.started.get_nowait().sequence_id


async def test_the_deadline_cancels(cluster: Cluster, stub: Any) -> None:
    await collect(stub.Generate(ask(), timeout=TIMEOUT))  # connected, before the time counts
    cluster.decode.gate.clear()
    code, _, _ = await refusal(stub.Generate(ask(), timeout=1.0))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(cluster.decode.cancelled.get(), TIMEOUT)


async def test_a_retry_goes_to_another_worker(cluster: Cluster, stub: Any) -> None:
    async def refuse(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        error = worker_pb2.SequenceError(code=14, message="not now", retryable=True)
        send(
            worker_pb2.SequenceOutput(
                sequence_id=start.sequence_id,
                finish_reason=common_pb2.FINISH_REASON_ERROR,
                error=error,
            )
        )

    cluster.decode.script = refuse
    await cluster.add(FakeWorker("d-1", "decode"))
    for _ in range(4):
        messages = await collect(stub.Generate(ask(seed=1), timeout=TIMEOUT))
        assert tokens_of(messages) == [10, 11, 12, 13]
        assert messages[-1].completed.completions[0].decode_worker == "d-1"


async def test_a_worker_that_dies_before_any_token_is_retried(cluster: Cluster, stub: Any) -> None:
    async def silent(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        await asyncio.Event().wait()

    cluster.prefill.script = silent
    cluster.decode.gate.clear()
    call = stub.Generate(ask(seed=1), timeout=TIMEOUT)
    await asyncio.wait_for(cluster.prefill.started.get(), TIMEOUT)
    await cluster.prefill.die()
    await cluster.add(FakeWorker("p-1", "prefill"))
    cluster.decode.gate.set()
    messages = await collect(call)
    assert tokens_of(messages) == [10, 11, 12, 13]
    assert messages[-1].completed.completions[0].prefill_worker == "p-1"


async def stuck_after_three(worker: FakeWorker, start: Any, send: Send) -> None:
    for i in range(3):
        send(token_output(start, i))
    await asyncio.Event().wait()


async def die_after_three(cluster: Cluster, call: Any) -> list[Any]:
    """The decode worker dies when the client has three tokens; what the client got till then."""
    messages = []
    while len(tokens_of(messages)) < 3:
        messages.append(await call.read())
    await cluster.decode.die()
    return messages


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"repetition_penalty": 1.2}])
async def test_a_stream_goes_on_when_its_decode_worker_dies(
    cluster: Cluster, stub: Any, sampling: dict[str, Any]
) -> None:
    cluster.decode.script = stuck_after_three
    call = stub.Generate(ask(max_tokens=6, min_tokens=5, logprobs=1, **sampling), timeout=TIMEOUT)
    messages = await die_after_three(cluster, call)
    await cluster.add(FakeWorker("d-1", "decode"))
    messages += await collect(call)
    assert tokens_of(messages) == [10, 11, 12, 13, 14, 15]
    assert "".join(m.delta.text for m in messages) == "t0 t1 t2 t3 t4 t5 "
    assert sum(len(m.delta.logprobs) for m in messages) == 6
    usage = messages[-1].completed.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 6)
    first, second = (cluster.prefill.started.get_nowait() for _ in range(2))
    assert list(second.prompt_token_ids) == [*first.prompt_token_ids, 10, 11, 12]
    assert (second.sampling.max_tokens, second.sampling.min_tokens) == (3, 2)
    ticket = cluster.prefill.ticket(second)
    assert ticket.prompt_digest == prompt_digest(list(second.prompt_token_ids))
    assert (ticket.decode_worker, ticket.num_tokens) == ("d-1", 6)


@pytest.mark.parametrize("sampling", [{"seed": 7}, {"temperature": 0, "stop": ["zz"]}])
async def test_what_an_engine_keeps_is_generated_anew(
    cluster: Cluster, stub: Any, sampling: dict[str, Any]
) -> None:
    cluster.decode.script = stuck_after_three
    call = stub.Generate(ask(max_tokens=6, **sampling), timeout=TIMEOUT)
    messages = await die_after_three(cluster, call)
    await cluster.add(FakeWorker("d-1", "decode"))
    messages += await collect(call)
    assert tokens_of(messages) == [10, 11, 12, 13, 14, 15]
    assert "".join(m.delta.text for m in messages) == "t0 t1 t2 t3 t4 t5 "
    first, second = (cluster.prefill.started.get_nowait() for _ in range(2))
    assert (second.prompt_token_ids, second.sampling) == (first.prompt_token_ids, first.sampling)


async def test_a_stream_that_cannot_go_on_exactly_ends_clearly(cluster: Cluster, stub: Any) -> None:
    cluster.decode.script = stuck_after_three
    await cluster.add(FakeWorker("d-1", "decode", stuck_after_three))
    call = stub.Generate(ask(max_tokens=6, presence_penalty=0.5), timeout=TIMEOUT)
    messages = []
    while len(tokens_of(messages)) < 3:
        messages.append(await call.read())
    for worker in cluster.workers[1:]:
        await worker.die()
    code, message, _ = await refusal(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "3 tokens" in message and "presence penalty" in message


async def test_contradicting_workers_give_an_internal_error(cluster: Cluster, stub: Any) -> None:
    async def other(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        output = token_output(start, 0)
        output.token_ids[0] = 77
        send(output)
        await asyncio.Event().wait()

    cluster.decode.script = other
    code, message, _ = await refusal(stub.Generate(ask(), timeout=TIMEOUT))
    assert code is grpc.StatusCode.INTERNAL
    assert re.fullmatch("internal error, reference [0-9a-f]+", message)


async def test_a_missing_worker_is_waited_for_and_then_named(
    cluster: Cluster, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.dispatch.PLACEMENT_WAIT_SECONDS", 0.2)
    cluster.registry.remove("d-0")
    await cluster.decode.die()
    code, message, _ = await refusal(stub.Generate(ask(), timeout=TIMEOUT))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "tiny has no" in message and "decode worker" in message
    monkeypatch.setattr("router.dispatch.PLACEMENT_WAIT_SECONDS", TIMEOUT)
    call = stub.Generate(ask(), timeout=TIMEOUT)
    await cluster.add(FakeWorker("d-1", "decode"))
    assert tokens_of(await collect(call)) == [10, 11, 12, 13]


async def test_a_worker_that_refuses_the_hello_is_not_placed_on(
    cluster: Cluster, stub: Any
) -> None:
    stranger = FakeWorker("d-1", "decode")
    await stranger.serve()
    cluster.registry.put(replace(stranger.record, incarnation="former-life"))
    for _ in range(3):
        messages = await collect(stub.Generate(ask(), timeout=TIMEOUT))
        assert messages[-1].completed.completions[0].decode_worker == "d-0"
    assert stranger.started.empty()
    await stranger.die()


async def test_a_new_life_of_a_worker_gets_a_new_link(cluster: Cluster, stub: Any) -> None:
    reborn = FakeWorker("d-0", "decode")
    reborn.record = replace(reborn.record, incarnation="second-life")
    await cluster.add(reborn)
    messages = await collect(stub.Generate(ask(seed=1), timeout=TIMEOUT))
    assert tokens_of(messages) == [10, 11, 12, 13]
    assert cluster.decode.started.qsize() + reborn.started.qsize() >= 1
    assert reborn.ticket(await reborn.started.get()).decode_incarnation == "second-life"


async def test_serving_goes_on_without_the_store(cluster: Cluster, channel: Any) -> None:
    cluster.registry.out = True
    cluster.registry.change()
    stub = inference_pb2_grpc.InferenceStub(channel)
    messages = await collect(stub.Generate(ask(), timeout=TIMEOUT))
    assert tokens_of(messages) == [10, 11, 12, 13]
    operator = operator_pb2_grpc.OperatorStub(channel)
    view = await operator.GetCluster(operator_pb2.GetClusterRequest(), timeout=TIMEOUT)
    assert not view.store_reachable
    assert [w.connected for w in view.workers] == [True, True]


async def test_a_slow_reader_is_cut_off(cluster: Cluster, stub: Any) -> None:
    async def flood(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        for i in range(start.sampling.max_tokens):
            output = token_output(start, i)
            output.text = "x" * 2000
            send(output)
            if i % 64 == 0:
                await asyncio.sleep(0)

    async def no_text(worker: FakeWorker, start: worker_pb2.StartSequence, send: Send) -> None:
        output = token_output(start, 0)
        output.text = ""
        send(output)

    cluster.decode.script, cluster.prefill.script = flood, no_text
    call = stub.Generate(ask(max_tokens=19_000), timeout=TIMEOUT)
    await call.read()
    await asyncio.wait_for(cluster.decode.cancelled.get(), TIMEOUT)
    code, message, (detail,) = await refusal(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "too slowly" in message
    assert detail.retry_delay.seconds == 1


async def test_a_first_token_leaves_before_others_are_let_in(
    cluster: Cluster, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    gate, write = cluster.router._dispatch.gate, Connection._write
    pump = gate.pump

    def let_in() -> None:
        happened.append("let in")
        pump()

    def written(connection: Connection, data: bytes) -> None:
        if b"t0 " in data:
            happened.append("left")
        write(connection, data)

    monkeypatch.setattr(gate, "pump", let_in)
    monkeypatch.setattr(Connection, "_write", written)
    cluster.decode.gate.clear()
    call = stub.Generate(ask(), timeout=TIMEOUT)
    await call.read()
    cluster.decode.gate.set()
    await collect(call)
    assert happened[:3] == ["let in", "left", "let in"]


async def test_overload_says_when_to_come_back() -> None:
    async with (
        running_cluster(max_running_requests=1, max_queued_requests=0) as cluster,
        grpc.aio.insecure_channel(cluster.router.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        cluster.decode.gate.clear()
        running = stub.Generate(ask(), timeout=TIMEOUT)
        await running.read()
        code, _, (detail,) = await refusal(stub.Generate(ask(), timeout=TIMEOUT))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail.retry_delay.ToNanoseconds() > 0
        cluster.decode.gate.set()
        await collect(running)


async def test_get_cluster(cluster: Cluster, channel: Any) -> None:
    stub = operator_pb2_grpc.OperatorStub(channel)
    view = await stub.GetCluster(operator_pb2.GetClusterRequest(), timeout=TIMEOUT)
    assert [(w.worker_id, w.role, w.connected) for w in view.workers] == [
        ("p-0", "prefill", True),
        ("d-0", "decode", True),
    ]
    assert (view.workers[0].pinned_blocks, view.workers[0].pinned_bytes) == (3, 64)
    assert [r.router_id for r in view.routers] == ["r-0"]
    assert view.store_reachable


async def test_health_and_reflection(cluster: Cluster, channel: Any) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "pdserve.v1.Inference", "pdserve.v1.Operator"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    reply = await anext(aiter(reflection.ServerReflectionInfo(iter([request]), timeout=TIMEOUT)))
    names = {service.name for service in reply.list_services_response.service}
    assert {"pdserve.v1.Inference", "pdserve.v1.Operator", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("setting", ["grpc_port", "http_port"])
async def test_a_taken_port_is_named(cluster: Cluster, setting: str) -> None:
    address = getattr(cluster.router, setting.replace("port", "address"))
    port = int(address.rsplit(":", 1)[1])
    second = cluster.new_router("r-1", **{setting: port})
    with pytest.raises(ConfigError, match=rf"router.{setting}.*{port}.*another one"):
        await second.start()


async def test_stop_drains(cluster: Cluster, channel: Any, stub: Any) -> None:
    cluster.decode.gate.clear()
    call = stub.Generate(ask(), timeout=TIMEOUT)
    await call.read()
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(cluster.router.stop(TIMEOUT))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    code, _, _ = await refusal(stub.Generate(ask(), timeout=TIMEOUT))
    assert code is grpc.StatusCode.UNAVAILABLE
    cluster.decode.gate.set()
    messages = await collect(call)
    assert messages[-1].HasField("completed")
    watch.cancel()
    await stopping
    assert await cluster.registry.routers() == []
    assert [e.state for e in cluster.journal.entries] == ["received", "finished"]
