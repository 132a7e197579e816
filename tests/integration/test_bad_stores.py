"""Stores and secrets that a cluster cannot start with, as `pdserve up` and `pdserve doctor` name
them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cluster.store.embedded import EmbeddedStore
from tests.cluster.running import MODEL
from tests.hosts.other_store import OtherStore, ahead_of

PDSERVE = Path(sys.executable).parent / "pdserve"
PASSWORD = "not-the-password-of-it"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[EmbeddedStore]:
    store = EmbeddedStore.start(tmp_path)
    yield store
    store.stop()


def pdserve(
    folder: Path, command: str, *options: str, env: dict[str, str] | None = None, **sections: object
) -> subprocess.CompletedProcess[str]:
    file = folder / "cluster.yaml"
    models = [{"name": "m", "path": str(MODEL)}]
    router = {"grpc_port": 0, "http_port": 0}
    file.write_text(json.dumps({"name": "bad", "models": models, "router": router, **sections}))
    own = {k: v for k, v in os.environ.items() if not k.startswith("PDSERVE_")}
    return subprocess.run(
        [PDSERVE, command, "-f", str(file), *options],
        env={**own, "PDSERVE_RUNTIME_DIR": str(folder / "run"), **(env or {})},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def refused(folder: Path, *words: str, **sections: object) -> None:
    """Both commands fail, with these words, and never show the password."""
    up = pdserve(folder, "up", **sections)
    assert up.returncode == 1 and "Traceback" not in up.stderr
    doctor = pdserve(folder, "doctor", "--json", **sections)
    assert doctor.returncode == 1
    failed = [c for c in json.loads(doctor.stdout)["checks"] if c["verdict"] == "fail"]
    said = [f"{c['name']} {c['detail']} {c['remedy']}" for c in failed]
    for word in words:
        assert word in " ".join(up.stderr.split()) and any(word in each for each in said), said
    assert PASSWORD not in up.stderr + doctor.stdout


def test_a_wrong_password(tmp_path: Path, store: EmbeddedStore) -> None:
    right = store.url.partition("redis://:")[2].partition("@")[0]
    url = store.url.replace(right, PASSWORD)
    refused(tmp_path, "refuses the password", "store.url", store={"url": url})


def test_a_server_that_is_too_old(tmp_path: Path, store: EmbeddedStore) -> None:
    with closing(OtherStore(store.url, "127.0.0.1", version="6.0.9")) as old:
        refused(tmp_path, "is version 6.0.9", "6.2 or newer", store={"url": old.url})


def test_the_doctor_sees_a_clock_that_tickets_cannot_live_with(
    tmp_path: Path, store: EmbeddedStore
) -> None:
    with closing(ahead_of(store.url, "127.0.0.1", 30.0)) as ahead:
        done = pdserve(tmp_path, "doctor", "--json", store={"url": ahead.url})
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["clock"]["verdict"]) == (1, "fail")
    assert "behind the store's" in checks["clock"]["detail"]
    assert "NTP" in checks["clock"]["remedy"]
    done = pdserve(tmp_path, "doctor", "--json", store={"url": store.url})
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert checks["clock"]["verdict"] == "ok"


def test_a_secret_that_is_not_there(tmp_path: Path) -> None:
    for command in ("up", "doctor"):
        done = pdserve(tmp_path, command, env={"PDSERVE_SECRET_FILE": "/run/secrets/none"})
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "PDSERVE_SECRET_FILE: /run/secrets/none cannot be read" in done.stderr


def test_tenants_whose_secrets_are_not_there(tmp_path: Path) -> None:
    tenants = [{"name": "t", "token_file": "none"}]
    refused(tmp_path, "tenants.t", "none cannot be read", tenants=tenants)
    refused(tmp_path, "operator", "NO_SUCH is not set", operator={"token_env": "NO_SUCH"})
