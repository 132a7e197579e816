"""What vLLM's configuration and KV tensors say of an engine rank's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cluster.kv.geometry import OPAQUE, PLAIN, KvGeometry
from cluster.kv.packing import Packing, learn_cpu_packing
from cluster.kv.paged import PagedCache

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PLAIN_BACKENDS = {
    "FLASH_ATTN",
    "TRITON_ATTN",
    "FLEX_ATTENTION",
    "CPU_MLA",
    "TRITON_MLA",
    "FLASHMLA",
    "FLASH_ATTN_MLA",
    "CUTLASS_MLA",
}
"""Their blocks hold a token's K, then its V (or its latent), one head and token after the other."""


def describe(
    config: VllmConfig, kv_caches: dict[str, torch.Tensor], kept: bool
) -> tuple[PagedCache, KvGeometry]:
    """The cache and how it is cut.

    Args:
        kept: see `PagedCache`.

    Raises:
        ValueError: the handoff cannot move such a cache; says why.
    """
    first = next(iter(kv_caches.values()))
    tokens, content = int(first.shape[-2]), int(first.shape[-1])
    if tokens != config.cache_config.block_size:
        raise ValueError(
            f"the attention kernel splits blocks of {config.cache_config.block_size} tokens into"
            f" blocks of {tokens}; set block_size to {tokens}"
        )
    packing = _packing(config, next(iter(kv_caches)), first, tokens, content)
    cache = PagedCache(kv_caches, packing, kept)
    model, ranks = config.model_config, config.parallel_config.tensor_parallel_size
    if ranks & (ranks - 1):
        raise ValueError(f"tensor_parallel_size must be a power of two, not {ranks}")
    heads = 1 if model.use_mla else model.get_total_num_kv_heads()
    geometry = KvGeometry(ranks, heads, tokens, cache.packing.name)
    if geometry.heads_of(0).count != cache.heads:
        if not geometry.opaque:
            raise ValueError(f"a cache of {cache.heads} heads a rank, where {heads} were expected")
        geometry = KvGeometry(ranks, cache.heads * ranks, tokens, cache.packing.name)
    return cache, geometry


def _packing(
    config: VllmConfig, layer_name: str, cache: torch.Tensor, tokens: int, content: int
) -> Packing:
    layer: Any = config.compilation_config.static_forward_context[layer_name]
    backend = layer.get_attn_backend().get_name()
    isa = getattr(layer, "isa", None)
    if cache.device.type == "cpu" and isa is not None:
        kind = config.cache_config.cache_dtype
        try:
            return learn_cpu_packing(tokens, content, cache.dtype, kind, isa)
        except ValueError:
            return Packing(tokens, content, f"{OPAQUE}cpu-{isa}-{kind}")
    if backend in _PLAIN_BACKENDS and config.cache_config.cache_dtype != "fp8_ds_mla":
        return Packing(tokens, content, PLAIN)
    return Packing(tokens, content, f"{OPAQUE}{backend.lower()}-{config.cache_config.cache_dtype}")
