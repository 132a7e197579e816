"""The command line: exit codes, errors with a remedy, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from cluster.cli import checks
from cluster.cli.calls import grpc_errors
from cluster.config import Config
from cluster.errors import ConfigError, Unauthenticated

ENV_PATH = os.pathsep.join(filter(None, sys.path))


@pytest.fixture
def pdserve(tmp_path: Path):  # type: ignore[no-untyped-def]
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PDSERVE_")},
        "PYTHONPATH": ENV_PATH,
        "PDSERVE_RUNTIME_DIR": str(tmp_path / "run"),
        "COLUMNS": "200",
    }

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        code = "from cluster.cli.main import main; main()"
        command = [sys.executable, "-c", code, *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)

    return run


def cluster_file(tmp_path: Path, **extra: object) -> str:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"0" * 1024)
    path = tmp_path / "cluster.yaml"
    # JSON is YAML.
    path.write_text(json.dumps({"models": [{"name": "m", "path": str(model)}], **extra}))
    return str(path)


def test_help_lists_every_command_without_importing_the_heavy_parts(pdserve) -> None:  # type: ignore[no-untyped-def]
    done = pdserve("--help")
    assert done.returncode == 0
    for command in (
        "up",
        "down",
        "status",
        "top",
        "generate",
        "bench",
        "demo",
        "doctor",
        "config",
        "batch",
        "reload",
        "drain-host",
        "plan",
        "simulate",
        "recommend",
        "explain",
        "scale",
        "flip",
        "drain",
        "release",
        "targets",
        "record",
        "profile",
    ):
        assert f" {command} " in done.stdout
    code = (
        "import sys, cluster.cli.main; print({'ray', 'grpc', 'torch', 'vllm'} & set(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": ENV_PATH},
        capture_output=True,
        text=True,
    )
    assert loaded.stdout.strip() == "set()"


@pytest.mark.parametrize("args", [("nonsense",), ("generate",), ("up", "--grpc-port", "x")])
def test_a_wrong_command_line_exits_2(pdserve, args: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    done = pdserve(*args)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [("down",), ("status",), ("generate", "hello")])
def test_without_a_cluster_the_way_to_one_is_named(pdserve, args: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    done = pdserve(*args)
    assert done.returncode == 1
    assert "no cluster runs here: start one with `pdserve up`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", ":", "no-such-host.invalid:1"])
def test_an_address_where_no_router_listens(pdserve, address: str) -> None:  # type: ignore[no-untyped-def]
    done = pdserve("generate", "hello", "--address", address)
    assert done.returncode == 1
    assert "no router answers at this address" in done.stderr
    assert "PDSERVE_CA_FILE" in done.stderr


def test_config_check_names_the_field_and_what_was_meant(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    good = cluster_file(tmp_path)
    assert pdserve("config", "check", "-f", good).returncode == 0
    bad = cluster_file(tmp_path, router={"grcp_port": 1})
    done = pdserve("config", "check", "-f", bad)
    assert done.returncode == 1
    assert "router.grcp_port" in done.stderr and "grpc_port" in done.stderr


def test_config_show_masks_secrets(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = cluster_file(
        tmp_path, secret="sixteen-characters!", store={"url": "redis://:hunter2@h:1/0"}
    )
    done = pdserve("config", "show", "-f", file)
    assert json.loads(done.stdout)["router"]["grpc_port"] == 50051
    assert "sixteen" not in done.stdout and "hunter2" not in done.stdout


def test_config_diff_tells_what_would_reload(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "new").mkdir()
    old = cluster_file(tmp_path, store={"url": "redis://:hunter2@h:1/0"})
    new = tmp_path / "new" / "cluster.yaml"
    changed = {**json.loads(Path(old).read_text()), "targets": {"ttft_seconds": 1}}
    new.write_text(json.dumps(changed))
    done = pdserve("config", "diff", "-f", str(new), "--against", old)
    assert (done.returncode, done.stdout) == (0, "targets.ttft_seconds: 2.0 → 1.0  (live)\n")
    assert pdserve("config", "diff", "-f", old, "--against", old).stdout == "nothing differs\n"
    new.write_text(json.dumps({**changed, "store": {"url": "redis://:hunter3@h:1/0"}}))
    done = pdserve("config", "diff", "-f", str(new), "--against", old)
    assert done.returncode == 1 and "store.url: changed  (every process" in done.stdout
    assert "hunter" not in done.stdout


def test_a_host_of_no_ray_cluster_has_nothing_to_drain(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = pdserve("drain-host", "-f", cluster_file(tmp_path))
    assert done.returncode == 1
    assert "`pdserve down` ends it" in done.stderr and "--ray-address" in done.stderr


def test_reload_without_a_cluster_names_the_way_to_one(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = pdserve("reload", "-f", cluster_file(tmp_path))
    assert done.returncode == 1 and "no cluster runs here" in done.stderr


def test_doctor_says_what_to_do_about_a_taken_port(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = cluster_file(tmp_path, router={"grpc_port": port})
        done = pdserve("doctor", "--json", "-f", file)
        assert done.returncode == 1
        checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
        assert checks["grpc_port"]["verdict"] == "fail"
        assert "--grpc-port" in checks["grpc_port"]["remedy"]
        assert checks["model m"]["verdict"] == "ok"
        up = pdserve("up", "-f", file)
        assert up.returncode == 1
        assert "--grpc-port" in up.stderr and "Traceback" not in up.stderr


def test_two_routers_of_one_host_need_free_ports(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = pdserve("up", "-f", cluster_file(tmp_path, router={"pool": {"replicas": 2}}))
    assert done.returncode == 1 and "cannot share fixed ports" in done.stderr


def test_doctor_looks_at_a_ray_of_several_hosts(pdserve, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        done = pdserve("doctor", "--json", "-f", cluster_file(tmp_path, ray={"address": address}))
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["ray"]["verdict"]) == (1, "fail")
    assert address in checks["ray"]["detail"] and "ray start --head" in checks["ray"]["remedy"]
    assert "RAY_AUTH_MODE=token" in checks["ray token"]["remedy"]
    assert checks["store.url"]["verdict"] == "fail"


def test_up_refuses_a_model_that_is_not_there_before_starting_anything(
    pdserve,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text('{"models": [{"name": "m", "path": "/no/such/model"}]}')
    done = pdserve("up", "-f", str(file))
    assert done.returncode == 1
    assert "/no/such/model does not exist" in done.stderr
    assert "store" not in done.stderr


def test_up_refuses_a_disk_without_room_and_doctor_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PDSERVE_RUNTIME_DIR", str(tmp_path / "run"))
    config = Config.load(Path(cluster_file(tmp_path, router={"grpc_port": 0, "http_port": 0})))
    free = checks.MIN_DISK

    def usage(_: object) -> shutil._ntuple_diskusage:
        return shutil._ntuple_diskusage(1 << 40, (1 << 40) - free, free)

    monkeypatch.setattr(checks.shutil, "disk_usage", usage)
    checks.before_start(config)
    assert [check.verdict for check in checks.disk()] == ["warn"]
    free -= 1
    with pytest.raises(ConfigError, match=f"free at {tmp_path}; .*PDSERVE_RUNTIME_DIR"):
        checks.before_start(config)


@pytest.mark.parametrize(
    ("token", "said"),
    [("another", "they are PDSERVE_TOKEN's"), ("", "PDSERVE_TOKEN is not set")],
)
def test_credentials_that_are_refused_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, token: str, said: str
) -> None:
    monkeypatch.setenv("PDSERVE_TOKEN", token)
    none = grpc.aio.Metadata()
    with pytest.raises(Unauthenticated, match=said), grpc_errors():
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAUTHENTICATED, none, none, "no caller of ours")
