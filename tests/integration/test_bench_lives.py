"""Router and workers as plain processes, and clients in theirs; engines are simulated."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.gpu import models
from bench.gpu.lives import Lives
from bench.predicted.clients import Clients
from cluster.simulator.workload import Arrival

ROLES = {"prefill-0": "prefill", "decode-0": "decode"}


def lives(folder: Path, path: Path) -> Lives:
    model = {"name": "tiny", "path": str(path), "engine": "simulated", "max_model_len": 4096}
    written = {
        "name": "predicted",
        "placement": {"disaggregate": "always"},
        "router": {"grpc_port": 0, "http_port": 0},
        "models": [model],
    }
    (folder / "cluster.yaml").write_text(json.dumps(written))
    return Lives(folder / "cluster.yaml", ROLES, {}, folder, folder / "logs")


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    yield (path := models.write(models.TINY, tmp_path / "tiny"))
    children = psutil.Process().children(recursive=True)
    assert not [c for c in children if "bench.gpu.life" in c.cmdline()], path


def test_a_load_is_sent_at_its_times(tmp_path: Path, model: Path) -> None:
    models.write_tokenizer(models.TINY, model)
    cluster = lives(tmp_path, model)
    clients = None
    try:
        cluster.start(60)
        clients = Clients(2, cluster.grpc_address, "tiny", 500)
        arrivals = [Arrival(0.1 * i, 100 + i, 250 + i) for i in range(5)]
        seen = clients.measure([*arrivals, Arrival(0.5, 5000, 3)])
    finally:
        if clients is not None:
            clients.close()
        cluster.stop()
    assert [s.arrival for s in seen[:5]] == arrivals
    for s in seen[:5]:
        assert s.error == ""
        assert s.late >= 0
        assert min(s.ttft, s.tpot) > 0
        assert s.bytes > 0, "it was handed off"
        assert 1 < len(s.came) <= s.output
    assert "5000" in seen[5].error
    assert seen[5].outcome.error


def test_a_life_that_cannot_serve_says_why(tmp_path: Path, model: Path) -> None:
    cluster = lives(tmp_path, model)
    (tmp_path / "cluster.yaml").write_text('{"name": "predicted", "models": []}')
    try:
        with pytest.raises(RuntimeError, match=r"(?s)-0 is not ready.*models"):
            cluster.start(60)
    finally:
        cluster.stop()
