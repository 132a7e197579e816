"""Several models in one cluster: pools of their own, requests routed by name, limits reloaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.config import Config
from cluster.control.compose import worker_host
from cluster.control.reconcile import desired_slots
from cluster.engine.simulated.tokens import continuation
from cluster.store.embedded import EmbeddedStore
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from router.server import RouterServer
from router.tokenize import Tokenizer
from tests.integration.router_fakes import Letters

SECRET = b"a secret of several models"
SEEDS = {"org/small": 3, "org/large": 4}
VOCAB = 500
PROMPT = [7, 8, 9] * 40


def config(**router: Any) -> Config:
    models = [
        {
            "name": name,
            "path": "/nowhere",
            "engine": "simulated",
            "max_model_len": 4096,
            "simulation": {"vocab_size": VOCAB, "seed": seed, "speed": 8.0},
        }
        for name, seed in SEEDS.items()
    ]
    settings = {"grpc_port": 0, "http_port": 0, **router}
    return Config.model_validate({"models": models, "router": settings})


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterServer]:
    async with AsyncExitStack() as stack:
        store = EmbeddedStore.start(tmp_path)
        stack.callback(store.stop)
        settings = config()
        for slot in desired_slots(settings):
            if slot.kind == "worker":
                host = worker_host(settings, slot.model, slot.slot_id, f"{slot.slot_id}-life",
                                   slot.role, SECRET, store.url, "127.0.0.1")  # fmt: skip
                stack.push_async_callback(host.stop, 0)
                await host.start()
        tokenizers = {name: Tokenizer(Letters()) for name in SEEDS}
        server = RouterServer(
            settings, "router-0", "life", SECRET, store.url, tokenizers=tokenizers
        )
        stack.push_async_callback(server.stop, 0)
        await server.start()
        await server.wait_ready(30)
        yield server


async def ask(router: RouterServer, model: str, max_tokens: int = 12) -> tuple[list[int], Any]:
    request = inference_pb2.GenerateRequest(
        model=model,
        token_ids=inference_pb2.TokenIds(ids=PROMPT),
        sampling=common_pb2.SamplingParams(temperature=0, max_tokens=max_tokens),
    )
    tokens: list[int] = []
    completed = None
    async with grpc.aio.insecure_channel(router.grpc_address) as channel:
        async for message in inference_pb2_grpc.InferenceStub(channel).Generate(
            request, timeout=30
        ):
            tokens += message.delta.token_ids
            completed = message.completed if message.HasField("completed") else None
    return tokens, completed


async def test_each_model_answers_for_itself_on_its_own_workers(router: RouterServer) -> None:
    names = list(SEEDS) * 4
    answers = await asyncio.gather(*(ask(router, name) for name in names))
    for name, (tokens, completed) in zip(names, answers, strict=True):
        assert tokens == continuation(PROMPT, 12, SEEDS[name], VOCAB)
        served = completed.completions[0]
        own = name.replace("/", "-")
        for worker in filter(None, (served.prefill_worker, served.decode_worker)):
            assert worker.startswith(f"{own}-")
    assert answers[0][0] != answers[1][0]


@pytest.mark.parametrize(
    ("model", "code"),
    [("org/none", grpc.StatusCode.NOT_FOUND), ("", grpc.StatusCode.INVALID_ARGUMENT)],
)
async def test_a_request_names_one_of_them(
    router: RouterServer, model: str, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(router, model)
    assert refused.value.code() is code


async def test_limits_change_while_requests_run(router: RouterServer) -> None:
    running = asyncio.create_task(ask(router, "org/small", max_tokens=400))
    while not router._dispatch.gate.running:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    router.reload(config(max_running_requests=1, max_queued_requests=0))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(router, "org/large")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    router.reload(config())
    tokens, _ = await ask(router, "org/large")
    assert tokens == continuation(PROMPT, 12, SEEDS["org/large"], VOCAB)
    tokens, _ = await running
    assert tokens == continuation(PROMPT, 400, SEEDS["org/small"], VOCAB)
