"""Where the blocks of a cache lie in host memory, for payloads that are not copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.kv.geometry import HeadRun

MIN_PIECE_BYTES = 8 << 10
"""A payload in smaller pieces than these, on average, is gathered first."""


@dataclass(frozen=True)
class Places:
    """The layers as bytes, one block behind the other.

    Attributes:
        head_bytes: of one head of one block.
        block_bytes: of one block, all heads.
    """

    layers: tuple[memoryview, ...]
    head_bytes: int
    block_bytes: int

    @classmethod
    def of(cls, layers: Sequence[torch.Tensor]) -> Places | None:
        """Of views `[blocks, heads, tokens, content]`; None if they are on a device, or if a
        layer's blocks do not lie one behind the other."""
        if not all(layer.device.type == "cpu" and layer.is_contiguous() for layer in layers):
            return None
        flat = (memoryview(layer.view(torch.uint8).flatten().numpy()) for layer in layers)
        return cls(tuple(flat), layers[0][0, 0].nbytes, layers[0][0].nbytes)

    def pieces(self, layers: range, block_ids: Sequence[int], heads: HeadRun) -> list[memoryview]:
        """See `PagedCache.pieces`."""
        start, stop = heads.start * self.head_bytes, heads.stop * self.head_bytes
        whole = stop - start == self.block_bytes
        runs = _runs(block_ids) if whole else [(block, block) for block in block_ids]
        if len(block_ids) * (stop - start) < MIN_PIECE_BYTES * len(runs):
            return []
        return [
            self.layers[layer][first * self.block_bytes + start : last * self.block_bytes + stop]
            for layer in layers
            for first, last in runs
        ]


def _runs(block_ids: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of ids that follow each other."""
    runs: list[tuple[int, int]] = []
    for block in block_ids:
        if runs and runs[-1][1] + 1 == block:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs
