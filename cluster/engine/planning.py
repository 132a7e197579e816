"""What a vLLM engine says of how it plans and launches its steps."""

from __future__ import annotations

from vllm.config import CUDAGraphMode, VllmConfig


def plans_ahead(config: VllmConfig) -> bool:
    """It starts a step before it has looked at the outcome of the one before."""
    return bool(config.scheduler_config.async_scheduling)


def graph_tokens(config: VllmConfig) -> int:
    """Steps with prompts and no more tokens are replayed from CUDA graphs; 0: none is."""
    compiled = config.compilation_config
    if compiled.cudagraph_mode.mixed_mode() == CUDAGraphMode.NONE:
        return 0
    return compiled.max_cudagraph_capture_size or 0
