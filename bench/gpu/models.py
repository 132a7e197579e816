"""The models of a session: real shapes, written to a folder; their weights are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARPNESS = 1.7
"""Gain of q and k each: attention scores spread by its square, so single tokens matter."""

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "dtype": "bfloat16",
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 128256,
}
"""config.json of meta-llama/Llama-3.1-8B."""

TINY: dict[str, Any] = {
    **LLAMA_3_1_8B,
    "dtype": "float32",
    "head_dim": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 1024,
}
"""The same architecture, small enough for a CPU."""


def write(config: dict[str, Any], folder: Path) -> Path:
    """A model folder without weights; `write_tokenizer` adds a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_tokenizer(config: dict[str, Any], folder: Path) -> None:
    """A tokenizer of bytes for a model folder; the rest of the vocabulary are made-up words."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    ends = {config["bos_token_id"]: "<s>", config["eos_token_id"]: "</s>"}
    letters = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    names = {i: ends.get(i) or next(letters, f"Ġ{i}") for i in range(config["vocab_size"])}
    core = Tokenizer(BPE({name: i for i, name in names.items()}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(ends.values()))
    core.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    """Of all layers, K and V."""
    item = {"float32": 4, "bfloat16": 2, "float16": 2}[config["dtype"]]
    heads = config["num_key_value_heads"] * config["head_dim"]
    return int(2 * config["num_hidden_layers"] * heads * item)


def checkpoint(config: Any) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, shape and standard deviation of every tensor; None for a norm."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden), 1.0
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,), None
        yield f"{at}.self_attn.q_proj.weight", (query, hidden), SHARPNESS * hidden**-0.5
        yield f"{at}.self_attn.k_proj.weight", (kv, hidden), SHARPNESS * hidden**-0.5
        yield f"{at}.self_attn.v_proj.weight", (kv, hidden), hidden**-0.5
        yield f"{at}.self_attn.o_proj.weight", (hidden, query), query**-0.5
        yield f"{at}.post_attention_layernorm.weight", (hidden,), None
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden), hidden**-0.5
        yield f"{at}.mlp.up_proj.weight", (inner, hidden), hidden**-0.5
        yield f"{at}.mlp.down_proj.weight", (hidden, inner), inner**-0.5
    yield "model.norm.weight", (hidden,), None
    yield "lm_head.weight", (config.vocab_size, hidden), hidden**-0.5
