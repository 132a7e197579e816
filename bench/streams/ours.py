"""pdserve's router, as a cluster runs it."""

from __future__ import annotations

import asyncio
import cProfile
from typing import Any

from bench.streams.processes import serve
from bench.streams.setting import SECRET, Load, config
from router.server import RouterServer


async def start(arguments: dict[str, Any]) -> tuple[dict[str, Any], object]:
    settings = config(Load(**arguments["load"]))
    router = RouterServer(settings, "router-0", "life", SECRET, arguments["store_url"])
    await router.start()
    await router.wait_ready(60)
    if path := arguments.get("profile"):
        _profile(path)
    return {"grpc": router.grpc_address, "http": f"http://{router.http_address}"}, router


def _profile(path: str) -> None:
    """Of this thread, which is the event loop's, from now on; written every second."""
    profiler = cProfile.Profile()

    def write() -> None:
        profiler.dump_stats(path)
        profiler.enable()
        asyncio.get_running_loop().call_later(1.0, write)

    write()


if __name__ == "__main__":
    serve(start)
