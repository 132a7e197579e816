"""Clusters that cannot start: exit status 1, one message with the cause and the remedy, no
traceback, nothing left running."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.store.embedded import EmbeddedStore
from tests.cluster.running import MODEL, PDSERVE


def cluster_file(folder: Path, **changes: object) -> Path:
    base: dict[str, object] = {
        "name": "bad-start",
        "models": [
            {
                "name": "recall-tiny",
                "path": str(MODEL),
                "dtype": "float32",
                "kv_cache_bytes": 64 << 20,
                "enforce_eager": True,
            }
        ],
        "router": {"grpc_port": 0, "http_port": 0},
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump({**base, **changes}))
    return path


def model(path: Path | str = MODEL, **changes: object) -> list[dict[str, object]]:
    return [
        {
            "name": "recall-tiny",
            "path": str(path),
            "dtype": "float32",
            "kv_cache_bytes": 64 << 20,
            "enforce_eager": True,
            **changes,
        }
    ]


def refused(file: Path, timeout: float = 60) -> str:
    """What `pdserve up` says; asserts that it ends by itself and leaves nothing."""
    before = set(psutil.pids())
    env = {**os.environ, "PDSERVE_RUNTIME_DIR": str(file.parent / "run")}
    done = subprocess.run(
        [PDSERVE, "up", "-f", str(file)], env=env, capture_output=True, text=True, timeout=timeout
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said
    left = [p for p in psutil.process_iter() if p.pid not in before and started_for(file, p)]
    assert not left
    return said


def started_for(file: Path, process: psutil.Process) -> bool:
    try:
        return str(file.parent) in " ".join(process.environ().values())
    except psutil.NoSuchProcess:  # another's, that has just ended
        return False


def taken_port() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_an_unknown_field(tmp_path: Path) -> None:
    said = refused(cluster_file(tmp_path, roter={"grpc_port": 0}))
    assert "roter" in said and "did you mean 'router'" in said


def test_an_impossible_value(tmp_path: Path) -> None:
    said = refused(cluster_file(tmp_path, models=model(block_size=0)))
    assert "models.0.block_size" in said


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("models: [")
    assert "is not YAML" in refused(file)


def test_no_such_file(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "none.yaml")


@pytest.mark.parametrize("which", ["grpc_port", "http_port"])
def test_a_port_in_use(tmp_path: Path, which: str) -> None:
    with taken_port() as listener:
        port = listener.getsockname()[1]
        router = {"grpc_port": 0, "http_port": 0, which: port}
        said = refused(cluster_file(tmp_path, router=router))
    assert str(port) in said and which in said


def test_a_missing_model(tmp_path: Path) -> None:
    said = refused(cluster_file(tmp_path, models=model(tmp_path / "none")))
    assert str(tmp_path / "none") in said


def test_too_little_memory(tmp_path: Path) -> None:
    said = refused(cluster_file(tmp_path, models=model(kv_cache_bytes=1 << 43)))
    assert "memory" in said.lower() and "kv_cache_bytes" in said


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    with taken_port() as listener:
        port = listener.getsockname()[1]
    url = f"redis://:hunter2@127.0.0.1:{port}/0"
    said = refused(cluster_file(tmp_path, store={"url": url, "connect_timeout_seconds": 1}))
    assert str(port) in said and "hunter2" not in said


def test_a_ray_that_is_not_there(tmp_path: Path) -> None:
    with taken_port() as listener:
        port = listener.getsockname()[1]
    store = EmbeddedStore.start(tmp_path / "store")
    try:
        changes = {"ray": {"address": f"127.0.0.1:{port}"}, "store": {"url": store.url}}
        said = refused(cluster_file(tmp_path, **changes), timeout=120)
    finally:
        store.stop()
    assert str(port) in said


@pytest.mark.timeout(400)
def test_an_engine_that_dies_while_starting(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    one_engine = model(broken, decode={"replicas": 0})
    said = refused(cluster_file(tmp_path, models=one_engine), timeout=300)
    assert "recall-tiny" in said and "log" in said
