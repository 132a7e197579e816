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
    """What clients of a run have seen, together.

    Attributes:
        messages: what tokens came in: a message over gRPC, a chunk over HTTP.
        begun: streams that have had a token.
    """

    tokens: int = 0
    messages: int = 0
    begun: int = 0
    wrong: int = 0


@dataclass(frozen=True)
class Times:
    """Of a stream, in seconds from its request: to its first token and to its last."""

    first: float
    last: float


class Watch:
    """One stream's tokens as they come, from its request on."""

    def __init__(self, max_tokens: int, seen: Seen) -> None:
        self._due = max_tokens
        self._seen = seen
        self._began = time.perf_counter()
        self._first = self._last = 0.0
        self.tokens = 0

    def saw(self, count: int, messages: int = 1) -> None:
        """So many tokens more."""
        if not count:
            return
        self._last = time.perf_counter() - self._began
        if not self._first:
            self._first = self._last
            self._seen.begun += 1
        self.tokens += count
        self._seen.tokens += count
        self._seen.messages += messages

    def saw_message(self, message: inference_pb2.GenerateResponse) -> None:
        """One of pdserve's, with tokens or without."""
        delta = message.delta
        count = len(delta.token_ids)
        self._seen.wrong += count > 0 and delta.offset != self.tokens
        self.saw(count)

    def end(self) -> Times:
        """Nothing more comes."""
        self._seen.wrong += self.tokens != self._due
        return Times(self._first, self._last)


def request(model: str, max_tokens: int, prompt: str) -> inference_pb2.GenerateRequest:
    """pdserve's."""
    sampling = common_pb2.SamplingParams(temperature=0, max_tokens=max_tokens)
    return inference_pb2.GenerateRequest(model=model, text=prompt, sampling=sampling)


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
        watch = Watch(max_tokens, seen)
        stub = self._stubs[self._next % len(self._stubs)]
        async for message in stub.Generate(
            request(model, max_tokens, prompt), timeout=self._timeout
        ):
            watch.saw_message(message)
        return watch.end()

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
        watch, spaces, newlines = Watch(max_tokens, seen), 0, 0
        async with self._session.post(self._url, json=body) as response:
            if response.status == 429:
                raise RefusedError
            response.raise_for_status()
            async for chunk, complete in response.content.iter_chunks():
                # Counted by bytes, however events are cut: one has one space after `data:` and two
                # newlines; a token of a simulated engine has one space in front.
                spaces += chunk.count(b" ")
                newlines += chunk.count(b"\n")
                watch.saw(spaces - newlines // 2 - watch.tokens, int(complete))
        return watch.end()

    async def close(self) -> None:
        await self._session.close()
