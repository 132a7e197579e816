"""Ray Serve's ingress as a user would write it: a FastAPI deployment that proxies the workers."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from typing import Any

import httpx
import psutil
import ray
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve as ray_serve

from bench.streams.processes import free_port, serve

app = FastAPI()


@ray_serve.deployment(max_ongoing_requests=20_000, ray_actor_options={"num_cpus": 0})
@ray_serve.ingress(app)
class Proxy:
    """Passes a completion's bytes through."""

    def __init__(self, urls: dict[str, list[str]]) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(timeout=None, limits=limits)
        self._backends = {model: itertools.cycle(addresses) for model, addresses in urls.items()}

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> StreamingResponse:
        body = await request.json()
        url = f"{next(self._backends[body['model']])}/v1/completions"

        async def passed() -> AsyncIterator[bytes]:
            async with self._client.stream("POST", url, json=body) as reply:
                async for chunk in reply.aiter_raw():
                    yield chunk

        return StreamingResponse(passed(), media_type="text/event-stream")


async def start(arguments: dict[str, Any]) -> tuple[dict[str, Any], object]:
    ray.init(
        address="local",  # Whatever else runs on this machine.
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
    )
    port = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(Proxy.bind(arguments["urls"]))  # type: ignore[attr-defined]
    return {"http": f"http://127.0.0.1:{port}", "pids": _serving()}, ray


def _serving() -> list[int]:
    """The proxy's and the replica's processes: what a token goes through."""
    below = psutil.Process(os.getpid()).children(recursive=True)
    titles = {process.pid: " ".join(process.cmdline()) for process in below}
    return [p for p, t in titles.items() if "ProxyActor" in t or "ServeReplica" in t]


if __name__ == "__main__":
    serve(start, uvloop=False)
