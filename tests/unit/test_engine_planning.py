"""What is read from vLLM's configuration about its steps."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.config import CompilationConfig, CUDAGraphMode

from cluster.engine.planning import graph_tokens, plans_ahead


class Config:
    def __init__(self, mode: CUDAGraphMode, ahead: bool | None) -> None:
        self.compilation_config = CompilationConfig(cudagraph_mode=mode)
        self.compilation_config.max_cudagraph_capture_size = 256
        self.scheduler_config: Any = type("Scheduler", (), {"async_scheduling": ahead})


@pytest.mark.parametrize(
    "mode, tokens",
    [
        (CUDAGraphMode.NONE, 0),
        (CUDAGraphMode.FULL_DECODE_ONLY, 0),
        (CUDAGraphMode.PIECEWISE, 256),
        (CUDAGraphMode.FULL_AND_PIECEWISE, 256),
    ],
)
def test_graphs_of_decodes_alone_hold_no_prompts(mode: CUDAGraphMode, tokens: int) -> None:
    config: Any = Config(mode, None)
    assert graph_tokens(config) == tokens


@pytest.mark.parametrize("said, ahead", [(True, True), (False, False), (None, False)])
def test_ahead_is_what_the_engine_says(said: bool | None, ahead: bool) -> None:
    config: Any = Config(CUDAGraphMode.NONE, said)
    assert plans_ahead(config) is ahead
