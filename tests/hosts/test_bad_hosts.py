"""What is wrong with a host, or with a host among others: `pdserve up` ends with its name, the
field and the remedy; nothing is tried for ever. Simulated engines on Ray's head."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.running import MODEL, PDSERVE
from tests.hosts.conftest import Ground
from tests.hosts.other_store import ahead_of
from tests.hosts.ray_cluster import PORT, RAY

SIMULATED = {"name": "m", "path": str(MODEL), "engine": "simulated", "max_model_len": 8000}
BOTH = ("prefill", "decode")


@dataclass(frozen=True)
class Bad:
    """A cluster that cannot be, and what must be said of it.

    Attributes:
        pool: of both roles, beside a place on the head.
        clock: the store is asked through something that shifts its clock by so many seconds.
        ray: the version of Ray that this host claims to have.
    """

    words: tuple[str, ...]
    model: dict[str, Any]
    pool: dict[str, Any]
    sections: dict[str, Any]
    clock: float = 0.0
    ray: str = ""


def bad(
    *words: str, model: dict[str, Any] | None = None, pool: dict[str, Any] | None = None,
    clock: float = 0.0, ray: str = "", **sections: Any,
) -> Bad:  # fmt: skip
    return Bad(words, model or SIMULATED, {"num_gpus": 0, **(pool or {})}, sections, clock, ray)


CASES = {
    "a GPU that only Ray counts": bad(
        "Ray counts a GPU on host HEAD", "no device", "--gpus", pool={"num_gpus": 1}),
    "a clock that tickets cannot live with": bad(
        "the clock on host HEAD is", "behind the store's", "NTP", clock=30.0),
    "a port taken on one host": bad(
        "worker.ports: cannot listen on port 6379 of HEAD", "in use", worker={"ports": PORT}),
    "an interface that does not exist": bad(
        "on host HEAD: handoff.host: this host has no interface eth9", "eth1 (198.19.",
        handoff={"host": "eth9"}),
    "another version of Ray": bad("runs other versions", "install ray==1.99.0", ray="1.99.0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def said(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `pdserve up` says of each, three at a time."""
    shifted = ahead_of(ground.store_url, ground.ray.head.gateway, 30.0)

    def one(case: Bad) -> str:
        url = shifted.url if case.clock else ground.store_url
        return refused(ground, tmp_path_factory.mktemp("bad"), case, url)

    with closing(shifted), ThreadPoolExecutor(3) as few:
        return dict(zip(CASES, few.map(one, CASES.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_is_named_with_its_remedy(said: dict[str, str], ground: Ground, name: str) -> None:
    for word in CASES[name].words:
        assert word.replace("HEAD", ground.ray.head.address) in said[name]


def refused(ground: Ground, folder: Path, case: Bad, url: str) -> str:
    """What `pdserve up` says until it ends, which it does by itself."""
    process = started(ground, folder, case, url)
    said = process.communicate(timeout=150)[0]
    assert process.returncode == 1 and "Traceback" not in said, said
    return re.sub(r"\s+", " ", said)


def started(ground: Ground, folder: Path, case: Bad, url: str) -> subprocess.Popen[str]:
    """`pdserve up` on the head."""
    file = folder / "cluster.yaml"
    file.write_text(text(f"bad-{secrets.token_hex(4)}", ground, case, url))
    env = {**ground.ray.env, "PDSERVE_RUNTIME_DIR": str(folder / "run")}
    if case.ray:
        env["PYTHONPATH"] = claims_ray(folder / "other", case.ray)
    return subprocess.Popen(
        [*ground.ray.head.within, PDSERVE, "up", "-f", str(file)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def text(name: str, ground: Ground, case: Bad, url: str) -> str:
    place = {"resources": {"head": 1}}
    return yaml.safe_dump(
        {
            "name": name,
            "models": [{**case.model, **{role: {**place, **case.pool} for role in BOTH}}],
            "router": {"grpc_port": 0, "http_port": 0, "pool": place},
            "ray": {"address": ground.ray.address},
            "store": {"url": url},
            **case.sections,
        }
    )


def claims_ray(folder: Path, version: str) -> str:
    """A PYTHONPATH with which an interpreter's Ray takes itself for another version."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import ray\nray.__version__ = {version!r}\n")
    return str(folder)


def test_more_gpus_than_any_host_has_are_waited_for_by_name(ground: Ground, tmp_path: Path) -> None:
    process = started(ground, tmp_path, bad(pool={"num_gpus": 8}), ground.store_url)
    assert process.stdout is not None
    wanted = (
        f"waiting for 1 head, 8 GPU; no host has 8 GPU: the most is 1, on {ground.ray.head.address}"
    )
    killer = threading.Timer(120, process.kill)
    killer.start()
    try:
        said = ""
        while not {f"m-{role}-0" for role in BOTH} <= set(re.findall(r"(\S+): " + wanted, said)):
            line = process.stdout.readline()
            assert line, said
            said += line
        process.terminate()
        process.communicate()
    finally:
        killer.cancel()


def test_a_model_that_is_on_one_host_only(ground: Ground, tmp_path: Path) -> None:
    """`pdserve up` sees it, and the host that is to run it does not: each has a /tmp of its own."""
    path = ground.ray.temp / "model"
    shutil.copytree(MODEL, path)
    elsewhere = ground.network.add()
    ground.ray.join(elsewhere, elsewhere=1)
    model = {"name": "m", "path": str(path), "dtype": "float32", "kv_cache_bytes": 128 << 20}
    case = bad(model=model, pool={"resources": {"elsewhere": 0.5}})
    spoken = refused(ground, tmp_path, case, ground.store_url)
    assert f"{path} does not exist on host {elsewhere.address}: it must be there on" in spoken


def test_a_host_with_another_ray_does_not_join(ground: Ground, tmp_path: Path) -> None:
    host = ground.network.add()
    done = subprocess.run(
        [*host.within, RAY, "start", f"--address={ground.ray.address}", "--disable-usage-stats",
         f"--node-ip-address={host.address}", "--num-cpus=1"],
        env={**ground.ray.env, "PYTHONPATH": claims_ray(tmp_path / "other", "1.99.0")},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Version mismatch" in done.stdout + done.stderr
