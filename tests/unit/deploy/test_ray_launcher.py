"""The cluster for Ray's own launcher: Ray's schema, its token, nothing exposed."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import yaml

LAUNCHER = Path(__file__).resolve().parents[3] / "deploy" / "ray" / "cluster.yaml"


def launcher() -> dict[str, object]:
    loaded: dict[str, object] = yaml.safe_load(LAUNCHER.read_text())
    return loaded


def starts() -> list[str]:
    cluster = launcher()
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]  # type: ignore[misc]
    return [command for command in commands if "ray start" in command]


def test_it_is_what_ray_takes() -> None:
    schema = json.loads((files("ray") / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(launcher(), schema)


def test_every_host_starts_under_the_token() -> None:
    assert len(starts()) == 2
    for command in starts():
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.pdserve/ray_token" in command
    assert "~/.pdserve/ray_token" in launcher()["file_mounts"]  # type: ignore[operator]


def test_the_head_has_no_dashboard_and_workers_join_it() -> None:
    head, worker = starts()
    assert "--head" in head and "--include-dashboard=false" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker and "--port=6379" in head
