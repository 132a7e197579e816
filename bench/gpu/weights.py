"""Made-up weights whose output hangs on the whole prompt, the same in every engine and any split.

vLLM's own dummy weights lie within 1e-3 of zero: attention then adds less than bfloat16 can show,
so the output hangs on the last token alone and would hide any damage to the KV. They are drawn per
rank, too, so a model over two GPUs is another model. These are drawn per tensor of the checkpoint,
from its name, at the scale of a trained network, and go through vLLM's loading into the shards.

An engine loads this module through `worker_extension_cls`, which registers the load format.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from bench.gpu.formats import LOAD_FORMAT
from cluster.kv.worker_extension import PdserveWorkerExtension

SEED = 1
SHARPNESS = 1.7
"""Gain of q and k each: attention scores spread by its square, so single tokens matter."""


@register_model_loader(LOAD_FORMAT)
class MadeUpLoader(BaseModelLoader):
    """Draws the checkpoint of a Llama."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to download."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        device = next(model.parameters()).device
        model.load_weights(drawn(model_config.hf_config, model_config.dtype, device))


def drawn(
    config: Any, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Checkpoint tensors by name; norms are 1, matrices keep the variance of what they multiply."""
    generator = torch.Generator(device)
    for name, shape, gain in shapes(config):
        if gain is None:
            yield name, torch.ones(shape, dtype=dtype, device=device)
            continue
        generator.manual_seed(SEED << 32 | zlib.crc32(name.encode()))
        drawing = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        yield name, drawing.mul_(gain)


def shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
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


class MadeUpWeights(PdserveWorkerExtension):
    """pdserve's worker extension, in a process that knows the load format."""


class PlainMadeUpWeights:
    """No extension, but its module is loaded; for a vLLM without pdserve's connector."""
