"""A model's shape: the sizes that decide its FLOPs, its weights and its KV cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with grouped-query attention and a gated MLP.

    Attributes:
        dtype_bytes: of a weight and of a KV element.
        max_model_len: prompt and output tokens.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    dtype_bytes: int = 2
    max_model_len: int = 131072

    @property
    def layer_parameters(self) -> int:
        """Of all layers: L·(2·h·nq·d + 2·h·nkv·d + 3·h·f)."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weight_bytes(self) -> int:
        """Layers and output head; the input embedding is a look-up of a few rows."""
        return (self.layer_parameters + self.hidden * self.vocab) * self.dtype_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    def prefill_flops(self, new: int, cached: int = 0) -> float:
        """Of `new` prompt tokens after `cached` ones, causal attention, one row of logits."""
        total = new + cached
        pairs = total**2 - cached**2
        attention = 2.0 * self.layers * self.heads * self.head_dim * pairs
        return 2.0 * self.layer_parameters * new + attention + 2.0 * self.hidden * self.vocab

    def decode_flops(self, batch: int, context: int) -> float:
        """Of one step for `batch` sequences that hold `context` tokens in all."""
        linear = 2.0 * (self.layer_parameters + self.hidden * self.vocab) * batch
        return linear + 4.0 * self.layers * self.heads * self.head_dim * context

    def decode_bytes(self, context: int) -> float:
        """What one decode step reads: the weights once, and every sequence's KV."""
        return float(self.weight_bytes + context * self.kv_bytes_per_token)


SHAPES: dict[str, ModelShape] = {
    s.name: s
    for s in (
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000, 2, 4096),
        ModelShape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064),
        ModelShape("qwen2.5-32b", 64, 5120, 40, 8, 128, 27648, 152064),
    )
}


def load_shape(model: str) -> ModelShape:
    """The shape of a known model by name, or of a directory with a `config.json`.

    Raises:
        InvalidRequest: it is neither, or its config lacks a size.
    """
    known = SHAPES.get(model.lower().rpartition("/")[2].removesuffix("-instruct"))
    if known is not None:
        return known
    path = Path(model)
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        names = ", ".join(SHAPES)
        raise InvalidRequest(
            "model", f"{model!r} is neither a directory with a config.json nor one of {names}"
        )
    try:
        values = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest("model", f"{config} is not JSON: {error}") from error
    return shape_of(path.name if path.is_dir() else path.stem, values)


_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a Hugging Face model configuration describes."""

    def size(*keys: str) -> int:
        for key in keys:
            value = config.get(key)
            if isinstance(value, int) and value > 0:
                return value
        raise InvalidRequest("model", f"config.json of {name} has no positive {keys[0]}")

    heads = size("num_attention_heads", "n_head")
    hidden = size("hidden_size", "n_embd")
    return ModelShape(
        name=name,
        layers=size("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config.get("intermediate_size") or 4 * hidden,
        vocab=size("vocab_size"),
        dtype_bytes=_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), 2),
        max_model_len=size("max_position_embeddings", "n_positions", "n_ctx"),
    )
