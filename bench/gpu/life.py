"""A worker's or a router's life: `python -m bench.gpu.life` runs the body that a cluster's actor
runs. Its first line of stdin says which; it ends with its stdin."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config import Config
from cluster.obs import logs
from cluster.obs.garbage import keep_what_is_loaded


@dataclass(frozen=True)
class Asked:
    """One life. Holds secrets: it goes over stdin.

    Attributes:
        role: prefill, decode or both; router.
        config: the cluster's file.
        ready: the file that is written when it serves: a router's address, or nothing.
    """

    name: str
    role: str
    config: str
    secret: str
    store_url: str
    ready: str
    start_seconds: float

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    def tell(self, address: str) -> None:
        """It serves."""
        written = Path(self.ready + ".part")
        written.write_text(address)
        written.rename(self.ready)


async def live(asked: Asked) -> None:
    config, secret = Config.load(Path(asked.config)), bytes.fromhex(asked.secret)
    address = ""
    if asked.role == "router":
        from router.server import RouterServer

        router = RouterServer(config, asked.name, f"{asked.name}-1", secret, asked.store_url)
        await router.start()
        await router.wait_ready(asked.start_seconds)
        address, stop = router.grpc_address, router.stop
    else:
        from cluster.control.compose import worker_host

        host = worker_host(
            config, config.models[0].name, asked.name, f"{asked.name}-1", asked.role, secret,
            asked.store_url, "127.0.0.1",
        )  # fmt: skip
        await host.start()
        stop = host.stop
    keep_what_is_loaded()
    asked.tell(address)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await stop(0)


if __name__ == "__main__":
    import uvloop  # as Ray's actors have it

    logs.setup()
    uvloop.run(live(Asked(**json.loads(sys.stdin.readline()))))
    os._exit(0)  # threads of an engine may be left
