"""The clusters that are loaded: the shipped demo, and two workers on cards of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from bench.gpu import models
from bench.gpu.lives import Lives
from bench.upstart import Up
from cluster.config import Config

GIB = 1 << 30
START_SECONDS = 300.0


class Cluster(Protocol):
    """Start it once, stop it always."""

    grpc_address: str

    def start(self, limit: float) -> None: ...
    def stop(self) -> object: ...


def demo(folder: Path) -> tuple[Config, Cluster]:
    """`pdserve up` without a file."""
    config = Config.load(None)
    return config, Up(config.name, None, folder)


def on_cards(folder: Path, logs: Path, cpu: bool, eager: bool) -> tuple[Config, Cluster]:
    """Llama-3.1-8B with made-up weights, a card a worker; or a tiny one on the CPU."""
    shape = models.TINY if cpu else models.LLAMA_3_1_8B
    path = models.write(shape, folder / ("tiny" if cpu else "llama-3.1-8b"))
    models.write_tokenizer(shape, path)
    engine_args: dict[str, Any] = {"load_format": "dummy"}
    if not cpu:
        # The KV cache's size is given, so this is only what must be free at the start.
        engine_args["gpu_memory_utilization"] = 0.1
    written = {
        "name": "predicted",
        "placement": {"disaggregate": "always"},
        "router": {"grpc_port": 0, "http_port": 0},
        "models": [
            {
                "name": "predicted",
                "path": str(path),
                "dtype": shape["dtype"],
                "max_model_len": 2048 if cpu else 9216,
                "max_num_batched_tokens": 512 if cpu else 8192,
                "kv_cache_bytes": (1 if cpu else 24) * GIB // (4 if cpu else 1),
                "enforce_eager": cpu or eager,
                "engine_args": engine_args,
            }
        ],
    }
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(written))
    roles = {"prefill-0": "prefill", "decode-0": "decode"}
    cards = {} if cpu else {name: (i,) for i, name in enumerate(roles)}
    return Config.load(file), Lives(file, roles, cards, folder, logs)
