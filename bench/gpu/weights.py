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

from bench.gpu.blocks import BlockSums
from bench.gpu.formats import LOAD_FORMAT
from bench.gpu.models import checkpoint
from cluster.kv.worker_extension import PdserveWorkerExtension, handoff_side

SEED = 1


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
    for name, shape, gain in checkpoint(config):
        if gain is None:
            yield name, torch.ones(shape, dtype=dtype, device=device)
            continue
        generator.manual_seed(SEED << 32 | zlib.crc32(name.encode()))
        drawing = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        yield name, drawing.mul_(gain)


class MadeUpWeights(PdserveWorkerExtension):
    """pdserve's worker extension, in a process that knows the load format."""

    def bench_watch(self) -> None:
        """Remembers the blocks of handoffs from now on."""
        side = handoff_side()
        assert side.agent is not None
        self._sums = BlockSums(side.agent, side.cache)

    def bench_sums(self, handoff_id: str) -> list[list[int]]:
        """See `BlockSums.sums`."""
        return self._sums.sums(handoff_id)


class PlainMadeUpWeights:
    """No extension, but its module is loaded; for a vLLM without pdserve's connector."""
