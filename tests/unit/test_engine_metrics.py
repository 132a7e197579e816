"""vLLM's metrics when several engines of one process start at the same time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from cluster.engine.stats import EngineMetrics

RECALL = Path(__file__).resolve().parents[2] / "examples" / "recall-tiny"


@pytest.fixture
def busy_threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that take turns every few bytecodes; what vLLM registered is taken out after it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            yield threads
    finally:
        sys.setswitchinterval(interval)
        unregister_vllm_metrics()


def test_engines_that_start_together_find_no_name_taken(busy_threads: ThreadPoolExecutor) -> None:
    config = AsyncEngineArgs(model=str(RECALL), enforce_eager=True).create_engine_config()
    made = list(busy_threads.map(lambda _: EngineMetrics(config, [0]), range(12)))
    assert len(made) == 12
    running = {"model_name": str(RECALL), "engine": "0"}
    assert REGISTRY.get_sample_value("vllm:num_requests_running", running) is not None
