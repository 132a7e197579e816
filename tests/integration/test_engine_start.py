"""A vLLM engine that does not come up."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cluster.config import HandoffConfig, ModelConfig
from cluster.engine.vllm import VllmEngine
from cluster.errors import EngineFailed

pytestmark = pytest.mark.slow


async def test_a_start_that_fails_leaves_nothing_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for variable in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(variable, "")  # the engine sets them; taken back at the end
    (tmp_path / "model").mkdir()
    model = ModelConfig(name="m", path=str(tmp_path / "model"))
    engine = VllmEngine(model, HandoffConfig(), "w", "a", b"s" * 32, "127.0.0.1", 1)
    with pytest.raises(EngineFailed, match="the engine of m did not start"):
        await engine.start()
    assert [name for name in os.listdir(tmp_path) if name.startswith("pdserve-kv-")] == []
