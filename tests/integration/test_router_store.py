"""The router with a real Valkey: it finds workers there, and serves on when it is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.store.client import connect
from cluster.store.embedded import EmbeddedStore
from cluster.store.journal import Journal
from cluster.store.registry import Registry
from pdserve.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)
from router.server import RouterServer
from router.tokenize import Tokenizer
from tests.integration.router_fakes import MODEL, SECRET, Cluster, Letters

TIMEOUT = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    store = EmbeddedStore.start(tmp_path)
    yield store
    store.stop()


async def generate(channel: grpc.aio.Channel, request_id: str) -> list[Any]:
    request = inference_pb2.GenerateRequest(
        text="hi", request_id=request_id, sampling=common_pb2.SamplingParams(max_tokens=3)
    )
    call = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=TIMEOUT)
    return [message async for message in call]


async def test_found_served_and_served_without(store: EmbeddedStore) -> None:
    fakes = Cluster()
    client = await connect(store.url, 30.0)
    registry = Registry(client, fakes.config.name)
    for worker in fakes.workers:
        await worker.serve()
        await registry.put_worker(worker.record, lease_seconds=60)
    tokenizers = {MODEL: Tokenizer(Letters())}
    router = RouterServer(fakes.config, "r-0", "x", SECRET, store.url, tokenizers=tokenizers)
    await router.start()
    try:
        await router.wait_ready(TIMEOUT)
        async with grpc.aio.insecure_channel(router.grpc_address) as channel:
            assert (await generate(channel, "one"))[-1].HasField("completed")
            operator = operator_pb2_grpc.OperatorStub(channel)
            view = await operator.GetCluster(operator_pb2.GetClusterRequest(), timeout=TIMEOUT)
            assert [r.grpc_address for r in view.routers] == [router.grpc_address]
            await router._observer.flush(TIMEOUT)
            entry = await Journal(client, fakes.config.name).get("one")
            assert entry is not None
            assert (entry.state, entry.completion_tokens) == ("finished", 3)
            assert sum(entry.phases.values()) > 0
            await client.aclose()
            store.stop()
            for i in range(5):
                assert (await generate(channel, f"later-{i}"))[-1].HasField("completed")
    finally:
        await router.stop(0)
        for worker in fakes.workers:
            await worker.die()
