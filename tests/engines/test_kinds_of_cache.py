"""Models whose cache is not that of plain attention: sliding windows, latent attention, fp8."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cluster.engine.protocol import Sampling
from cluster.errors import EngineFailed
from tests.engines.pairs import RECALL, VOCABULARY, model_folder, split, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
    "initializer_range": 0.5,
}
SLIDING = {
    **COMMON,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 64,
}
LATENT = {
    **COMMON,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 3,
    "rope_scaling": None,
}


async def says_what_one_engine_says(path: Path, **settings: Any) -> None:
    async with started(path, {"prefill": settings, "decode": settings}) as (prefill, decode):
        assert prefill.info.layout == decode.info.layout
        rng = random.Random(5)
        sampling = Sampling(max_tokens=16, temperature=0, ignore_eos=True)
        for count in (1, 31, 33, 257, 700):
            prompt = [rng.randrange(6, VOCABULARY) for _ in range(count)]
            one = await prefill.whole(f"{count}-whole", prompt, sampling)
            tokens, result = await split(prefill, decode, f"{count}", prompt, sampling)
            assert tokens == one, f"{count} tokens"
            assert result.bytes > 0
        await prefill.assert_nothing_held()
        await decode.assert_nothing_held()


async def test_sliding_windows(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "sliding", SLIDING)
    await says_what_one_engine_says(path, engine_args={"load_format": "dummy"})


async def test_latent_attention(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "latent", LATENT)
    # What vLLM prefers on CPUs with AMX takes no float32.
    own = {"load_format": "dummy", "attention_backend": "CPU_MLA"}
    await says_what_one_engine_says(path, engine_args=own)


async def test_an_fp8_cache() -> None:
    try:
        await says_what_one_engine_says(RECALL, engine_args={"kv_cache_dtype": "fp8"})
    except EngineFailed as failure:
        if "AVX-512" in str(failure):
            pytest.skip(f"vLLM has no fp8 cache for this CPU: {failure}")
        raise
