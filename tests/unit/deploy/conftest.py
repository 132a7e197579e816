from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import Config
from tests.unit.deploy.manifests import NAMES, Overlay, missing_kubectl, render


@pytest.fixture(params=NAMES)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    if why := missing_kubectl():
        pytest.skip(why)
    return render(request.param)


@pytest.fixture
def config(overlay: Overlay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """As the pod with `pdserve up` reads it."""
    monkeypatch.setenv("PDSERVE_SECRET", "s" * 32)
    monkeypatch.setenv("PDSERVE_STORE__URL", "redis://:x@pdserve-valkey:6379/0")
    file = tmp_path / "cluster.yaml"
    file.write_text(overlay.cluster_yaml)
    return Config.load(file)
