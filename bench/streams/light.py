"""A client that takes little of a core: where grpc.aio shares one with the engines, those two are
what is full, and not the system."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time

import grpc

from bench.streams.clients import RefusedError, Seen, Times
from bench.streams.setting import PROMPT
from cluster.rpc.client import CallFailed, ClientConnection, connected
from cluster.rpc.limits import Limits
from pdserve.v1 import common_pb2, inference_pb2

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
        sampling = common_pb2.SamplingParams(temperature=0, max_tokens=max_tokens)
        request = inference_pb2.GenerateRequest(model=model, text=prompt, sampling=sampling)
        began, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0

        def received(message: bytes) -> None:
            nonlocal first, last, tokens
            delta = inference_pb2.GenerateResponse.FromString(message).delta
            count = len(delta.token_ids)
            if not count:
                return
            last = time.perf_counter() - began
            if not first:
                first = last
                seen.open += 1
            seen.wrong += delta.offset != tokens
            tokens += count
            seen.tokens += count
            seen.messages += 1

        call = connection.open(GENERATE, self._metadata, received)
        try:
            call.send(request.SerializeToString())
            call.send_no_more()
            await asyncio.shield(call.finished)
        except CallFailed as error:
            if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise RefusedError from error
            raise
        finally:
            call.cancel()
        seen.open -= 1
        seen.wrong += tokens != max_tokens
        return Times(first, last)

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
