"""Clients: open a stream, see every token once and in order, say when the first came."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import grpc.aio

from bench.streams.setting import PROMPT
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc


@dataclass
class Seen:
    """What clients of a run have seen, together."""

    tokens: int = 0
    messages: int = 0
    open: int = 0
    wrong: int = 0


class Client(Protocol):
    """One way to reach the workers."""

    async def run(self, model: str, max_tokens: int, seen: Seen) -> float:
        """A stream to its end; seconds to its first token."""
        ...

    async def close(self) -> None: ...


class GrpcClient:
    """pdserve's own API."""

    def __init__(self, address: str, channels: int = 4) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(channels)]
        self._stubs = [inference_pb2_grpc.InferenceStub(c) for c in self._channels]
        self._next = 0

    async def run(self, model: str, max_tokens: int, seen: Seen) -> float:
        self._next += 1
        request = inference_pb2.GenerateRequest(
            model=model,
            text=PROMPT,
            sampling=common_pb2.SamplingParams(temperature=0, max_tokens=max_tokens),
        )
        began, first, tokens = time.perf_counter(), 0.0, 0
        call = self._stubs[self._next % len(self._stubs)].Generate(request, timeout=600)
        async for message in call:
            delta = message.delta
            count = len(delta.token_ids)
            if not count:
                continue
            if not first:
                first = time.perf_counter() - began
                seen.open += 1
            seen.wrong += delta.offset != tokens
            tokens += count
            seen.tokens += count
            seen.messages += 1
        seen.open -= 1
        seen.wrong += tokens != max_tokens
        return first

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


class HttpClient:
    """OpenAI's completions: server-sent events."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/v1/completions"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=600)
        )

    async def run(self, model: str, max_tokens: int, seen: Seen) -> float:
        body = {
            "model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0,
            "stream": True,
        }  # fmt: skip
        began, first = time.perf_counter(), 0.0
        tokens = spaces = newlines = events = 0
        async with self._session.post(self._url, json=body) as response:
            assert response.status == 200, await response.text()
            async for chunk in response.content.iter_any():
                # Counted by bytes, however chunks are cut: an event has one space after `data:` and
                # two newlines; a token of a simulated engine has one space in front.
                spaces += chunk.count(b" ")
                newlines += chunk.count(b"\n")
                came = spaces - newlines // 2 - tokens
                if came > 0 and not first:
                    first = time.perf_counter() - began
                    seen.open += 1
                tokens += came
                seen.tokens += came
                seen.messages += newlines // 2 - events
                events = newlines // 2
        seen.open -= 1
        seen.wrong += tokens != max_tokens
        return first

    async def close(self) -> None:
        await self._session.close()
