"""The workers: simulated engines behind the worker protocol, and behind HTTP for other systems."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

from aiohttp import web

from bench.streams.processes import serve
from bench.streams.setting import LOAD, PROBE, PROBE_ROLES, SECRET, WORKER_ROLES, Load, config
from cluster.control.compose import worker_host
from cluster.engine.protocol import Engine, EngineRequest, Sampling


class Completions:
    """`POST /v1/completions` of one engine: a server-sent event per output."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._count = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._count += 1
        prompt = [8 + ord(letter) % 500 for letter in body["prompt"][::4]]
        sampling = Sampling(max_tokens=body["max_tokens"], temperature=0)
        asked = EngineRequest(f"http-{self._count}", prompt, sampling)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async with aclosing(self._engine.generate(asked)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                chunk = {"choices": [{"text": output.text}], "tokens": len(output.token_ids)}
                line = json.dumps(chunk, separators=(",", ":"))
                await response.write(f"data: {line}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


async def start(arguments: dict[str, Any]) -> tuple[dict[str, Any], object]:
    settings = config(Load(**arguments["load"]))
    hosts = []
    urls: dict[str, list[str]] = {LOAD: [], PROBE: []}
    for model, roles in ((LOAD, WORKER_ROLES), (PROBE, PROBE_ROLES)):
        for worker_id, role in roles.items():
            host = worker_host(
                settings, model, worker_id, f"{worker_id}-life", role, SECRET,
                arguments["store_url"], "127.0.0.1",
            )  # fmt: skip
            await host.start()
            hosts.append(host)
            if role == "decode":
                assert host._engine is not None
                app = web.Application()
                app.router.add_post("/v1/completions", Completions(host._engine).__call__)
                runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
                await runner.setup()
                site = web.TCPSite(runner, "127.0.0.1", 0, backlog=8192)
                await site.start()
                urls[model].append(f"http://127.0.0.1:{runner.addresses[0][1]}")
    return {"urls": urls}, hosts


if __name__ == "__main__":
    serve(start)
