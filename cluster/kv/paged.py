"""Blocks in and out of a paged KV cache."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
import xxhash

# Payloads are read-only memory that is only ever copied from. torch warns of that once a process.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", dtype=np.uint8))


class Fence(Protocol):
    """A point in a device's work."""

    def synchronize(self) -> None:
        """Blocks until the device has got there."""
        ...


class PagedCache:
    """The KV cache of one engine rank.

    On a GPU, copies run on a stream of their own, beside the engine's compute.

    Args:
        layers: layer name to a view `[blocks, heads, tokens, content]`, in model order.
    """

    def __init__(self, layers: Mapping[str, torch.Tensor]) -> None:
        self.layer_names = list(layers)
        self._layers = list(layers.values())
        shapes = {tuple(layer.shape) for layer in self._layers}
        if len(shapes) != 1 or len(next(iter(shapes))) != 4:
            raise ValueError(f"layers of different or unknown KV shapes cannot move: {shapes}")
        first = self._layers[0]
        self.num_blocks, self.heads, self.tokens, self.content = map(int, first.shape)
        self.dtype = first.dtype
        self.item_bytes = int(first.element_size())
        self._device = first.device
        self._stream = torch.cuda.Stream(self._device) if first.is_cuda else None

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer."""
        return self.heads * self.tokens * self.content * self.item_bytes

    def fence(self) -> Fence | None:
        """Marks what the calling thread has queued on the device so far; None where nothing is
        queued, as on CPUs."""
        if self._stream is None:
            return None
        fence: Fence = torch.cuda.current_stream(self._device).record_event()
        return fence

    def gather(self, layer: int, block_ids: Sequence[int]) -> memoryview:
        """The blocks' bytes, row-major `[blocks, heads, tokens, content]`."""
        with torch.cuda.stream(self._stream):  # nothing on CPUs
            picked = self._layers[layer].index_select(0, self._index(block_ids)).cpu()
        return memoryview(picked.view(torch.uint8).numpy()).cast("B")

    def scatter(self, layer: int, block_ids: Sequence[int], payload: memoryview) -> None:
        """Writes `payload`, as `gather` gives it, into the blocks; it is there on return."""
        flat = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8)).view(self.dtype)
        shape = (len(block_ids), self.heads, self.tokens, self.content)
        with torch.cuda.stream(self._stream):
            source = flat.view(shape).to(self._device)
            self._layers[layer].index_copy_(0, self._index(block_ids), source)
        if self._stream is not None:
            self._stream.synchronize()

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(block_ids, dtype=torch.int64, device=self._device)


def checksum(payload: memoryview, handoff_id: str) -> int:
    """XXH3-64 of the payload, seeded so that another handoff's frame never matches."""
    seed = int(handoff_id[:16], 16)
    return xxhash.xxh3_64_intdigest(payload, seed=seed)
