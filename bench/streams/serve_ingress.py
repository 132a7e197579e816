"""Ray Serve's ingress: the same proxy as a deployment, behind Serve's own HTTP proxy."""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import psutil
import ray
from ray import serve as ray_serve

from bench.streams.minimal import app_for


def start(arguments: dict[str, Any]) -> dict[str, Any]:
    urls = arguments["urls"]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    port = _free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})

    @ray_serve.deployment(max_ongoing_requests=20_000)
    @ray_serve.ingress(lambda: app_for(urls))
    class Ingress:
        pass

    ray_serve.run(Ingress.bind())
    wanted = ("ServeReplica", "ProxyActor")
    family = psutil.Process().children(recursive=True)
    pids = [p.pid for p in family if any(name in " ".join(p.cmdline()) for name in wanted)]
    return {"http": f"http://127.0.0.1:{port}", "pids": pids}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    said = start(json.loads(sys.argv[1]))
    print("ready " + json.dumps(said), flush=True)
    sys.stdin.read()
    ray_serve.shutdown()
    ray.shutdown()
    os._exit(0)
