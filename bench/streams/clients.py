"""Clients: open a stream, see every token once and in order, say when the first came."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import grpc.aio

from bench.streams.setting import PROMPT
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

TIMEOUT_HEADER = "X-Request-Timeout-Seconds"


@dataclass
class Seen:
    """What clients of a run have seen, together."""

    tokens: int = 0
    messages: int = 0
    open: int = 0
    wrong: int = 0


@dataclass(frozen=True)
class Times:
    """Of a stream, in seconds from its request: to its first token and to its last."""

    first: float
    last: float


class RefusedError(Exception):
    """The system has no room: RESOURCE_EXHAUSTED, or HTTP 429."""


class Client(Protocol):
    """One way to reach the workers."""

    async def run(self, model: str, max_tokens: int, seen: Seen, prompt: str = PROMPT) -> Times:
        """A stream to its end.

        Raises:
            RefusedError, and of other failures what the library raises.
        """
        ...

    async def close(self) -> None: ...


class GrpcClient:
    """pdserve's own API.

    Args:
        timeout: seconds, of a request.
    """

    def __init__(self, address: str, channels: int = 4, timeout: float = 600) -> None:
        self._timeout = timeout
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(channels)]
        self._stubs = [inference_pb2_grpc.InferenceStub(c) for c in self._channels]
        self._next = 0

    async def run(self, model: str, max_tokens: int, seen: Seen, prompt: str = PROMPT) -> Times:
        try:
            return await self._run(model, max_tokens, seen, prompt)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise RefusedError from error
            raise

    async def _run(self, model: str, max_tokens: int, seen: Seen, prompt: str) -> Times:
        self._next += 1
        request = inference_pb2.GenerateRequest(
            model=model,
            text=prompt,
            sampling=common_pb2.SamplingParams(temperature=0, max_tokens=max_tokens),
        )
        began, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0
        stub = self._stubs[self._next % len(self._stubs)]
        call = stub.Generate(request, timeout=self._timeout)
        async for message in call:
            delta = message.delta
            count = len(delta.token_ids)
            if not count:
                continue
            last = time.perf_counter() - began
            if not first:
                first = last
                seen.open += 1
            seen.wrong += delta.offset != tokens
            tokens += count
            seen.tokens += count
            seen.messages += 1
        seen.open -= 1
        seen.wrong += tokens != max_tokens
        return Times(first, last)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class HttpClient:
    """OpenAI's completions: server-sent events. Arguments as GrpcClient's."""

    def __init__(self, url: str, timeout: float = 600) -> None:
        self._url = f"{url}/v1/completions"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout),
            headers={TIMEOUT_HEADER: f"{timeout:g}"},
        )

    async def run(self, model: str, max_tokens: int, seen: Seen, prompt: str = PROMPT) -> Times:
        body = {
            "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "stream": True,
        }  # fmt: skip
        began, first, last = time.perf_counter(), 0.0, 0.0
        tokens = spaces = newlines = events = 0
        async with self._session.post(self._url, json=body) as response:
            if response.status == 429:
                raise RefusedError
            response.raise_for_status()
            async for chunk in response.content.iter_any():
                # Counted by bytes, however chunks are cut: an event has one space after `data:` and
                # two newlines; a token of a simulated engine has one space in front.
                spaces += chunk.count(b" ")
                newlines += chunk.count(b"\n")
                came = spaces - newlines // 2 - tokens
                if came > 0:
                    last = time.perf_counter() - began
                    if not first:
                        first = last
                        seen.open += 1
                tokens += came
                seen.tokens += came
                seen.messages += newlines // 2 - events
                events = newlines // 2
        seen.open -= 1
        seen.wrong += tokens != max_tokens
        return Times(first, last)

    async def close(self) -> None:
        await self._session.close()
