"""Ray Serve's ingress: the same proxy as a deployment, behind Serve's own HTTP proxy."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import psutil
import ray
from fastapi import FastAPI
from ray import serve as ray_serve

from bench.streams.minimal import app_for


def start(arguments: dict[str, Any]) -> dict[str, Any]:
    urls = arguments["urls"]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": 0 or _free_port()})
    outer = FastAPI()

    @ray_serve.deployment(max_ongoing_requests=20_000)
    @ray_serve.ingress(lambda: _mounted(outer, urls))
    class Ingress:
        pass

    ray_serve.run(Ingress.bind())
    wanted = ("ServeReplica", "ProxyActor")
    family = psutil.Process().children(recursive=True)
    pids = [p.pid for p in family if any(name in " ".join(p.cmdline()) for name in wanted)]
    return {"http": f"http://127.0.0.1:{_port[0]}", "pids": pids}


_port: list[int] = []


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        _port.append(probe.getsockname()[1])
    return _port[0]


def _mounted(outer: FastAPI, urls: dict[str, list[str]]) -> FastAPI:
    outer.mount("/", app_for(urls))
    return outer


if __name__ == "__main__":
    said = start(json.loads(sys.argv[1]))
    print("ready " + json.dumps(said), flush=True)
    sys.stdin.read()
    ray_serve.shutdown()
    ray.shutdown()
    os._exit(0)
