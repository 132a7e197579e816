"""A cluster's model as a plain vLLM's arguments: the same settings, without the connector."""

from __future__ import annotations

from typing import Any

from cluster.config import ModelConfig


def plain_args(model: ModelConfig) -> dict[str, Any]:
    """Arguments of `AsyncEngineArgs`."""
    chosen: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "block_size": model.block_size,
        "max_num_batched_tokens": model.max_num_batched_tokens,
        "max_num_seqs": model.max_num_seqs,
        "tensor_parallel_size": model.tensor_parallel_size,
        "enforce_eager": model.enforce_eager,
        "trust_remote_code": model.trust_remote_code,
        "kv_cache_memory_bytes": model.kv_cache_bytes,
        "enable_prefix_caching": True,
        "enable_log_requests": False,
    }
    return {**chosen, **model.engine_args}
