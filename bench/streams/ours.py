"""pdserve's router, as a cluster runs it."""

from __future__ import annotations

from typing import Any

from bench.streams.processes import serve
from bench.streams.setting import SECRET, Load, config
from router.server import RouterServer


async def start(arguments: dict[str, Any]) -> tuple[dict[str, Any], object]:
    settings = config(Load(**arguments["load"]))
    router = RouterServer(settings, "router-0", "life", SECRET, arguments["store_url"])
    await router.start()
    await router.wait_ready(60)
    return {"grpc": router.grpc_address, "http": f"http://{router.http_address}"}, router


if __name__ == "__main__":
    serve(start)
