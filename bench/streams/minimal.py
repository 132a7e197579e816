"""The proxy that a user would write: FastAPI in front, httpx behind, bytes passed through."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from bench.streams.processes import serve


def app_for(urls: dict[str, list[str]]) -> FastAPI:
    app = FastAPI()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(timeout=None, limits=limits)
    backends = {model: itertools.cycle(addresses) for model, addresses in urls.items()}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        backend = next(backends[body["model"]])

        async def passed() -> AsyncIterator[bytes]:
            async with client.stream("POST", f"{backend}/v1/completions", json=body) as reply:
                async for chunk in reply.aiter_raw():
                    yield chunk

        return StreamingResponse(passed(), media_type="text/event-stream")

    return app


async def start(arguments: dict[str, Any]) -> tuple[dict[str, Any], object]:
    settings = uvicorn.Config(
        app_for(arguments["urls"]), port=0, log_level="warning", backlog=8192, access_log=False
    )
    server = uvicorn.Server(settings)
    running = asyncio.create_task(server.serve())
    while not server.started:
        assert not running.done()
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    return {"http": f"http://127.0.0.1:{port}"}, running


if __name__ == "__main__":
    serve(start)
