"""The workers: simulated engines behind the worker protocol, and bare, behind HTTP and gRPC.

The bare ones are what other systems proxy, and what a first token past any system is measured on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
from aiohttp import ClientConnectionResetError, web

from bench.streams.processes import serve
from bench.streams.setting import (
    LOAD,
    PROBE,
    PROBE_ROLES,
    SECRET,
    WORKER_ROLES,
    Load,
    config,
    stand_in_ids,
)
from cluster.control.compose import worker_host
from cluster.engine.protocol import Engine, EngineOutput, EngineRequest, Sampling
from cluster.engine.simulated.tokens import text_of
from cluster.store.records import WorkerRecord
from pdserve.v1 import inference_pb2, inference_pb2_grpc


class Bare:
    """One engine's `/v1/completions`, an event per output, and its Inference.Generate."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = itertools.count()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with suppress(ClientConnectionResetError):
            async with aclosing(self._run(body["prompt"], body["max_tokens"])) as outputs:
                async for output in outputs:
                    chunk = {"choices": [{"text": output.text}], "tokens": len(output.token_ids)}
                    line = json.dumps(chunk, separators=(",", ":"))
                    await response.write(f"data: {line}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        return response

    async def generate(self, request: inference_pb2.GenerateRequest, context: Any) -> None:
        offset = 0
        async with aclosing(self._run(request.text, request.sampling.max_tokens)) as outputs:
            async for output in outputs:
                message = inference_pb2.GenerateResponse()
                message.delta.offset = offset
                message.delta.token_ids.extend(output.token_ids)
                message.delta.text = output.text
                offset += len(output.token_ids)
                await context.write(message)

    def _run(self, prompt: str, max_tokens: int) -> Any:
        token_ids = stand_in_ids(prompt)  # Not tokenised, because proxies do not either.
        sampling = Sampling(max_tokens=max_tokens, temperature=0)
        asked = EngineRequest(f"bare-{next(self._count)}", token_ids, sampling)
        return self._engine.generate(asked)


async def several(
    generate: Callable[[EngineRequest], AsyncIterator[EngineOutput]],
    count: int,
    request: EngineRequest,
) -> AsyncIterator[EngineOutput]:
    """A request's outputs as an engine that guesses ahead gives them: `count` tokens with each step
    but the first, as far as the request wants them; they are all the one that was sampled."""
    most = left = request.sampling.max_tokens
    steps = 1 + -(-(left - 1) // count)
    asked = replace(request, sampling=replace(request.sampling, max_tokens=steps))
    async with aclosing(generate(asked)) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            tokens: list[int] = []
            for token in output.token_ids:
                size = min(count if left < most else 1, left)
                left -= size
                tokens += [token] * size
            yield output._replace(token_ids=tokens, text="".join(map(text_of, tokens)))


class Front(inference_pb2_grpc.InferenceServicer):
    """Generate of one bare engine."""

    def __init__(self, bare: Bare) -> None:
        self.Generate = bare.generate  # type: ignore[method-assign]


async def start(arguments: dict[str, Any]) -> tuple[dict[str, Any], object]:
    load = Load(**arguments["load"])
    settings = config(load)
    kept: list[object] = []
    records: dict[str, WorkerRecord] = {}
    urls: dict[str, list[str]] = {LOAD: [], PROBE: []}
    server = grpc.aio.server()
    for model, roles in ((LOAD, WORKER_ROLES), (PROBE, PROBE_ROLES)):
        for worker_id, role in roles.items():
            host = worker_host(
                settings, model, worker_id, f"{worker_id}-life", role, SECRET,
                arguments["store_url"], "127.0.0.1",
            )  # fmt: skip
            await host.start()
            kept.append(host)
            if model == PROBE:
                records[role] = host.record
            assert host._engine is not None
            if model == LOAD and load.tokens_per_output > 1:
                engine: Any = host._engine
                engine.generate = partial(several, engine.generate, load.tokens_per_output)
            if role != "decode" and not load.finite:
                continue
            bare = Bare(host._engine)
            app = web.Application()
            app.router.add_post("/v1/completions", bare.completions)
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=8192)
            await site.start()
            urls[model].append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            if model == PROBE:
                inference_pb2_grpc.add_InferenceServicer_to_server(Front(bare), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    probed = {role: vars(record) for role, record in records.items()}
    return {"urls": urls, "grpc": address, "records": probed}, [*kept, server]


if __name__ == "__main__":
    serve(start)
