"""Blocks in and out of a paged KV cache.

A layer's cache is a view `[blocks, heads, tokens, content]`, whatever its strides. Payloads are
flat tensors of bytes on the cache's device or on the host, row-major in that order. When both sides
have the same blocks, blocks are copied as they lie; otherwise they cross in plain order, token by
token (`Packing`), and are written slot by slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from cluster.kv.geometry import HeadRun
from cluster.kv.packing import Packing

_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fence(Protocol):
    """A point in a device's work."""

    def synchronize(self) -> None:
        """Blocks until the device has got there."""
        ...


@dataclass(frozen=True)
class Slots:
    """Where tokens go: the `[first, last)` of a prompt that a payload may fill.

    Attributes:
        block_ids: of the whole prompt.
    """

    block_ids: Sequence[int]
    first: int
    last: int


class PagedCache:
    """The KV cache of one engine rank.

    Args:
        layers: layer name to a view `[blocks, heads, tokens, content]`, in model order.
        packing: how the attention kernel orders a block.

    Raises:
        ValueError: the layers differ in shape or type, or are not such views.
    """

    def __init__(self, layers: Mapping[str, torch.Tensor], packing: Packing | None = None) -> None:
        self.layer_names = list(layers)
        tensors = list(layers.values())
        kinds = {(tuple(layer.shape), layer.dtype) for layer in tensors}
        if len(kinds) != 1 or tensors[0].dim() != 4:
            raise ValueError(f"layers of different or unknown KV shapes cannot move: {kinds}")
        first = tensors[0]
        self.num_blocks, self.heads, self.tokens, self.content = map(int, first.shape)
        self.dtype = first.dtype
        self.item_bytes = int(first.element_size())
        self.device = first.device
        self.packing = packing or Packing(self.tokens, self.content)
        # Bytes are bytes: copied in the widest words that fit, and laid out anew item by item.
        wide = next(w for w in (8, 4, 2, 1) if self.content * self.item_bytes % w == 0)
        self._wide = [layer.view(_WIDTHS[wide]) for layer in tensors]
        self._items = [layer.view(_WIDTHS[self.item_bytes]) for layer in tensors]
        self._stream = torch.cuda.Stream(self.device) if first.is_cuda else None

    @property
    def num_layers(self) -> int:
        return len(self._wide)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one layer, of all heads of this rank."""
        return self.heads * self.head_block_bytes

    @property
    def head_block_bytes(self) -> int:
        """Bytes of one head of one block of one layer."""
        return self.tokens * self.content * self.item_bytes

    def fence(self) -> Fence | None:
        """Marks what the calling thread has queued on the device so far; None where nothing is
        queued, as on CPUs."""
        return None if self._stream is None else self._mark(torch.cuda.current_stream(self.device))

    def written(self) -> Fence | None:
        """Everything written by `scatter` and `scatter_tokens` so far."""
        return None if self._stream is None else self._mark(self._stream)

    def _mark(self, stream: Any) -> Fence:
        event: Fence = torch.cuda.Event(blocking=True)
        stream.record_event(event)
        return event

    def blocks(self, layer: int, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy of whole blocks of a layer, `[blocks, heads, tokens, content]`, on the device."""
        return self._items[layer].index_select(0, self._index(block_ids))

    # ---- out ---------------------------------------------------------------------------------

    def gather(
        self,
        layer: int,
        block_ids: Sequence[int],
        heads: HeadRun,
        payload: torch.Tensor,
        *,
        plain: bool = False,
    ) -> Fence | None:
        """Copies blocks into `payload`, uint8 `[blocks × heads × head_block_bytes]`.

        On a GPU the copy is queued on the cache's own stream; it is done once the fence is reached.
        """
        with torch.cuda.stream(self._stream):  # nothing on CPUs
            index = self._index(block_ids)
            if plain and self.packing.order is not None:
                source = self._items[layer][:, heads.start : heads.stop].index_select(0, index)
                source = source.flatten(2)[:, :, self.packing.order.to(self.device)]
                payload.view(source.dtype).view(source.shape).copy_(source, non_blocking=True)
            else:
                source = self._wide[layer][:, heads.start : heads.stop]
                shape = (len(block_ids), *source.shape[1:])
                target = payload.view(source.dtype).view(shape)
                if self._stream is None:
                    _take(source, block_ids, target)
                elif payload.is_cuda:
                    torch.index_select(source, 0, index, out=target)
                else:
                    target.copy_(source.index_select(0, index), non_blocking=True)
            return None if self._stream is None else self._mark(self._stream)

    # ---- in ----------------------------------------------------------------------------------

    def scatter(
        self, layer: int, block_ids: Sequence[int], heads: HeadRun, payload: torch.Tensor
    ) -> None:
        """Writes whole blocks, as `gather` of a cache with the same blocks gives them.

        On a GPU the write is queued on the cache's own stream, see `written`.
        """
        target = self._wide[layer][:, heads.start : heads.stop]
        source = payload.view(target.dtype).view(len(block_ids), *target.shape[1:])
        if self._stream is None:
            target.numpy()[list(block_ids)] = source.numpy()
            return
        with torch.cuda.stream(self._stream):
            source = source.to(self.device, non_blocking=True)
            target.index_copy_(0, self._index(block_ids), source)

    def scatter_tokens(
        self,
        layer: int,
        first_token: int,
        block_tokens: int,
        slots: Slots,
        heads: HeadRun,
        payload: torch.Tensor,
    ) -> None:
        """Writes plain blocks of another size, from the prompt's `first_token` on.

        Only tokens within `slots` are written; so a block that is shared or not yet due is not
        touched.

        Args:
            block_tokens: tokens per block of the payload.
        """
        items = self._items[layer]
        with torch.cuda.stream(self._stream):
            plain = payload.view(items.dtype).view(-1, heads.count, block_tokens, self.content)
            tokens = plain.transpose(1, 2).reshape(-1, heads.count, self.content)
            low = max(slots.first, first_token)
            high = min(slots.last, first_token + len(tokens))
            if high <= low:
                return
            source = tokens[low - first_token : high - first_token].to(self.device)
            at = torch.arange(low, high, device=self.device)
            block = self._index(slots.block_ids)[at // self.tokens][:, None]
            head = torch.arange(heads.start, heads.stop, device=self.device)[None, :]
            if self.packing.order is None:
                items[block, head, (at % self.tokens)[:, None]] = source
            else:
                place = self.packing.order.view(self.tokens, self.content).to(self.device)
                items.view(self.num_blocks, self.heads, -1)[
                    block[:, :, None], head[:, :, None], place[at % self.tokens][:, None]
                ] = source

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(block_ids, dtype=torch.int64, device=self.device)


def _take(source: torch.Tensor, block_ids: Sequence[int], target: torch.Tensor) -> None:
    """On CPUs through numpy, which takes one thread: torch would wake the engine's own, which then
    spin for a while, on every frame."""
    if source.is_contiguous():
        np.take(source.numpy(), block_ids, axis=0, out=target.numpy(), mode="clip")
    else:
        target.numpy()[...] = source.numpy()[list(block_ids)]
