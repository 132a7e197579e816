"""A router and worker hosts with simulated engines, in one process, around a real Valkey."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from cluster.config import Config
from cluster.control.compose import worker_host
from cluster.engine.simulated.tokens import continuation
from cluster.store.embedded import EmbeddedStore
from cluster.worker.host import WorkerHost
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from router.server import RouterServer
from router.tokenize import Tokenizer
from tests.integration.router_fakes import Letters

MODEL, VOCAB, SEED = "made-up", 800, 11
SECRET = b"a secret of the simulated cluster"
TIMEOUT = 60.0


def config(simulation: dict[str, Any] | None = None, **sections: Any) -> Config:
    model = {
        "name": MODEL,
        "path": "/nowhere",
        "engine": "simulated",
        "max_model_len": 20_000,
        "max_num_batched_tokens": 1024,
        "simulation": {"vocab_size": VOCAB, "seed": SEED, "speed": 4.0, **(simulation or {})},
    }
    router = {"grpc_port": 0, "http_port": 0, **sections.pop("router", {})}
    return Config(models=[model], router=router, **sections)  # type: ignore[list-item,arg-type]


class SimulatedCluster:
    """Attributes: hosts: by worker id; router; channel: to the router."""

    def __init__(self, settings: Config, store: EmbeddedStore) -> None:
        self.config = settings
        self.store = store
        self.hosts: dict[str, WorkerHost] = {}
        tokenizers = {MODEL: Tokenizer(Letters())}
        self.router = RouterServer(
            settings, "router-0", "life", SECRET, store.url, tokenizers=tokenizers
        )
        self.channel: grpc.aio.Channel
        self.last_id = ""

    async def add(self, worker_id: str, role: str) -> WorkerHost:
        host = worker_host(
            self.config, MODEL, worker_id, f"{worker_id}-life", role, SECRET, self.store.url,
            "127.0.0.1",
        )  # fmt: skip
        await host.start()
        self.hosts[worker_id] = host
        return host

    async def generate(self, prompt: list[int], **sampling: Any) -> tuple[list[int], Any]:
        """The tokens, whose offsets never skipped or repeated, and the last message."""
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            sampling=common_pb2.SamplingParams(temperature=0, **sampling),
        )
        stub = inference_pb2_grpc.InferenceStub(self.channel)
        tokens: list[int] = []
        completed = None
        async for message in stub.Generate(request, timeout=TIMEOUT):
            self.last_id = message.request_id
            if message.HasField("completed"):
                completed = message.completed
            else:
                assert message.delta.offset == len(tokens)
                tokens += message.delta.token_ids
        return tokens, completed


def answer(prompt: list[int], count: int) -> list[int]:
    return continuation(prompt, count, SEED, VOCAB)


@contextlib.asynccontextmanager
async def simulated_cluster(
    folder: Path, roles: dict[str, str], settings: Config
) -> AsyncIterator[SimulatedCluster]:
    """Args: roles: by worker id."""
    store = EmbeddedStore.start(folder)
    cluster = SimulatedCluster(settings, store)
    try:
        for worker_id, role in roles.items():
            await cluster.add(worker_id, role)
        await cluster.router.start()
        await cluster.router.wait_ready(TIMEOUT)
        async with grpc.aio.insecure_channel(cluster.router.grpc_address) as cluster.channel:
            yield cluster
    finally:
        await cluster.router.stop(0)
        for host in cluster.hosts.values():
            await host.stop(0)
        store.stop()
