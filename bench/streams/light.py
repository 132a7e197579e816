"""A client that takes little of a core: where grpc.aio shares one with the engines, those two are
what is full, and not the system."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import grpc

from bench.streams.clients import RefusedError, Seen, Times, Watch, request
from bench.streams.setting import PROMPT
from cluster.rpc.client import CallFailed, ClientConnection, connected
from cluster.rpc.limits import Limits
from pdserve.v1 import inference_pb2

LIMITS = Limits(message_bytes=4 << 20, calls=0)
GENERATE = f"/{inference_pb2.DESCRIPTOR.services_by_name['Inference'].full_name}/Generate"
CONNECT_SECONDS = 10.0


class LightClient:
    """pdserve's gRPC API through `cluster.rpc`. Arguments as GrpcClient's."""

    def __init__(self, address: str, channels: int = 4, timeout: float = 600) -> None:
        self._address = address
        self._channels = channels
        self._metadata = (("grpc-timeout", f"{round(timeout)}S"),)
        self._stack = contextlib.AsyncExitStack()
        self._turns: itertools.cycle[ClientConnection] | None = None
        self._connecting = asyncio.Lock()

    async def run(self, model: str, max_tokens: int, seen: Seen, prompt: str = PROMPT) -> Times:
        connection = await self._connection()
        watch = Watch(max_tokens, seen)

        def received(message: bytes) -> None:
            watch.saw_message(inference_pb2.GenerateResponse.FromString(message))

        call = connection.open(GENERATE, self._metadata, received)
        try:
            call.send(request(model, max_tokens, prompt).SerializeToString())
            call.send_no_more()
            await asyncio.shield(call.finished)
        except CallFailed as error:
            if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise RefusedError from error
            raise
        finally:
            call.cancel()
        return watch.end()

    async def close(self) -> None:
        await self._stack.aclose()

    async def _connection(self) -> ClientConnection:
        async with self._connecting:
            if self._turns is None:
                made = [
                    await self._stack.enter_async_context(
                        connected(self._address, LIMITS, CONNECT_SECONDS)
                    )
                    for _ in range(self._channels)
                ]
                self._turns = itertools.cycle(made)
        return next(self._turns)
