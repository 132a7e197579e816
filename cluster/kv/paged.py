"""Blocks in and out of a paged KV cache.

A layer's cache is a view `[blocks, heads, tokens, content]`, whatever its strides. Payloads are
flat tensors of bytes on the cache's device or on the host, row-major in that order. When both sides
have the same blocks, blocks are copied as they lie; otherwise they cross in plain order, token by
token (`Packing`), and are written slot by slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from cluster.kv.geometry import HeadRun
from cluster.kv.milestones import Fence
from cluster.kv.packing import Packing
from cluster.kv.places import Places

if TYPE_CHECKING:
    from cluster.kv.block_copies import BlockCopies
    from cluster.kv.transport.checksums import Tally

_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


BlockIndex: TypeAlias = "Sequence[int] | torch.Tensor"
"""Block ids as `PagedCache.index` gives them; a slice of it is one, too."""


@dataclass(frozen=True)
class Slots:
    """Where tokens go: the `[first, last)` of a prompt that a payload may fill.

    Attributes:
        block_ids: of the whole prompt.
    """

    block_ids: BlockIndex
    first: int
    last: int


class PagedCache:
    """The KV cache of one engine rank.

    Args:
        layers: layer name to a view `[blocks, heads, tokens, content]`, in model order.
        packing: how the attention kernel orders a block.
        kept: the engine keeps a prompt's blocks, each its own, until its handoff has ended.
            Otherwise – sliding windows – it uses them for what follows, so that they must be
            copied as soon as they are computed, and lets one block stand for all that are out of
            the window, so that what is written to it is not what is found there.

    Raises:
        ValueError: the layers differ in shape or type, or are not such views.
    """

    def __init__(
        self,
        layers: Mapping[str, torch.Tensor],
        packing: Packing | None = None,
        kept: bool = True,
    ) -> None:
        self.kept = kept
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
        order = self.packing.order
        self._order = None if order is None else order.to(self.device)
        self._stream = torch.cuda.Stream(self.device, priority=-1) if first.is_cuda else None
        self._copies = _copies(self._wide) if first.is_cuda else None
        self._places = Places.of(tensors)

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
        return None if self._stream is None else self.mark(torch.cuda.current_stream(self.device))

    def mark(self, stream: Any = None) -> Fence | None:
        """Marks everything queued on a stream so far; on the cache's own if none is named."""
        if self._stream is None:
            return None
        fence: Fence = torch.cuda.Event(blocking=True)
        (stream or self._stream).record_event(fence)
        return fence

    def hold(self, fence: Fence | None, stream: Any = None) -> None:
        """Whatever is queued from now on waits, on the device, until `fence` is reached."""
        if fence is not None and self._stream is not None:
            (stream or self._stream).wait_event(fence)

    def index(self, block_ids: Sequence[int], stream: Any = None) -> BlockIndex:
        """Block ids where they are used, for calls on the same stream."""
        if self._stream is None:
            return block_ids
        with torch.cuda.stream(stream or self._stream):
            pinned = torch.tensor(block_ids, dtype=torch.int64).pin_memory()
            index: torch.Tensor = pinned.to(self.device, non_blocking=True)
            return index

    def blocks(self, layer: int, block_ids: Sequence[int]) -> torch.Tensor:
        """A copy of whole blocks of a layer, `[blocks, heads, tokens, content]`, on the device."""
        index = torch.as_tensor(block_ids, dtype=torch.int64, device=self.device)
        return self._items[layer].index_select(0, index)

    def pieces(self, layers: range, block_ids: Sequence[int], heads: HeadRun) -> list[memoryview]:
        """Blocks of some layers where they lie in host memory, in a payload's order; none where
        they do not lie so, or in pieces so small that a copy costs less."""
        if self._places is None or not self.kept:
            return []
        return self._places.pieces(layers, block_ids, heads)

    # ---- out ---------------------------------------------------------------------------------

    def gather(
        self,
        layers: range,
        index: BlockIndex,
        heads: HeadRun,
        payload: torch.Tensor,
        *,
        plain: bool = False,
        stream: Any = None,
        tally: Tally | None = None,
    ) -> None:
        """Copies blocks of some layers into `payload`, uint8
        `[layers × blocks × heads × head_block_bytes]`, which `tally` counts.

        On a GPU the copy is queued on `stream`, or on the cache's own; see `mark`.
        """
        plain = plain and self._order is not None
        with torch.cuda.stream(stream or self._stream):  # nothing on CPUs
            if self._copies and not plain:
                assert isinstance(index, torch.Tensor)
                there = (
                    payload if payload.is_cuda else torch.empty_like(payload, device=self.device)
                )
                self._copies.gather(layers.start, index, _range(heads), there, tally)
                if there is not payload:
                    payload.copy_(there, non_blocking=True)
                return
            for layer, part in zip(layers, payload.chunk(len(layers)), strict=True):
                if plain:
                    self._gather_plain(layer, index, heads, part)
                else:
                    self._gather(layer, index, heads, part)
            if tally is not None:
                tally.count(payload)

    def _gather(self, layer: int, index: BlockIndex, heads: HeadRun, payload: torch.Tensor) -> None:
        source = self._wide[layer][:, heads.start : heads.stop]
        target = payload.view(source.dtype).view(len(index), *source.shape[1:])
        if isinstance(index, torch.Tensor):
            target.copy_(source.index_select(0, index), non_blocking=True)
        else:
            _take(source, index, target)

    def _gather_plain(
        self, layer: int, index: BlockIndex, heads: HeadRun, payload: torch.Tensor
    ) -> None:
        source = self._items[layer][:, heads.start : heads.stop]
        source = source.index_select(0, _tensor(index)).flatten(2)[:, :, self._order]
        payload.view(source.dtype).view(source.shape).copy_(source, non_blocking=True)

    # ---- in ----------------------------------------------------------------------------------

    def scatter(
        self,
        layers: range,
        index: BlockIndex,
        heads: HeadRun,
        payload: torch.Tensor,
        *,
        stream: Any = None,
        tally: Tally | None = None,
    ) -> None:
        """Writes whole blocks, as `gather` of a cache with the same blocks gives them.

        On a GPU the write is queued on `stream`, or on the cache's own; see `mark`.
        """
        with torch.cuda.stream(stream or self._stream):
            if self._copies:
                assert isinstance(index, torch.Tensor)
                there = payload.to(self.device, non_blocking=True)
                self._copies.scatter(layers.start, index, _range(heads), there, tally)
                return
            if tally is not None:
                tally.count(payload)
            for layer, part in zip(layers, payload.chunk(len(layers)), strict=True):
                target = self._wide[layer][:, heads.start : heads.stop]
                source = part.view(target.dtype).view(len(index), *target.shape[1:])
                if isinstance(index, torch.Tensor):
                    target.index_copy_(0, index, source.to(self.device, non_blocking=True))
                else:
                    target.numpy()[list(index)] = source.numpy()

    def count(self, payload: torch.Tensor, tally: Tally, *, stream: Any = None) -> None:
        """Counts a payload as `scatter` does."""
        with torch.cuda.stream(stream or self._stream):
            tally.count(payload)

    def scatter_tokens(
        self,
        layer: int,
        first_token: int,
        block_tokens: int,
        slots: Slots,
        heads: HeadRun,
        payload: torch.Tensor,
        *,
        stream: Any = None,
    ) -> None:
        """Writes plain blocks of another size, from the prompt's `first_token` on.

        Only tokens within `slots` are written; so a block that is shared or not yet due is not
        touched.

        Args:
            block_tokens: tokens per block of the payload.
        """
        items = self._items[layer]
        with torch.cuda.stream(stream or self._stream):
            plain = payload.view(items.dtype).view(-1, heads.count, block_tokens, self.content)
            tokens = plain.transpose(1, 2).reshape(-1, heads.count, self.content)
            low = max(slots.first, first_token)
            high = min(slots.last, first_token + len(tokens))
            if high <= low:
                return
            source = tokens[low - first_token : high - first_token].to(self.device)
            at = torch.arange(low, high, device=self.device)
            block = _tensor(slots.block_ids)[at // self.tokens][:, None]
            head = torch.arange(heads.start, heads.stop, device=self.device)[None, :]
            if self._order is None:
                items[block, head, (at % self.tokens)[:, None]] = source
            else:
                place = self._order.view(self.tokens, self.content)
                items.view(self.num_blocks, self.heads, -1)[
                    block[:, :, None], head[:, :, None], place[at % self.tokens][:, None]
                ] = source


def _copies(layers: Sequence[torch.Tensor]) -> BlockCopies | None:
    from cluster.kv.block_copies import BlockCopies  # Triton is there with GPUs only

    return BlockCopies(layers) if BlockCopies.fits(layers) else None


def _range(heads: HeadRun) -> range:
    return range(heads.start, heads.stop)


def _tensor(index: BlockIndex) -> torch.Tensor:
    return torch.as_tensor(index, dtype=torch.int64)


def _take(source: torch.Tensor, block_ids: Sequence[int], target: torch.Tensor) -> None:
    """On CPUs through numpy, which takes one thread: torch would wake the engine's own, which then
    spin for a while, on every frame."""
    if source.is_contiguous():
        np.take(source.numpy(), block_ids, axis=0, out=target.numpy(), mode="clip")
    else:
        target.numpy()[...] = source.numpy()[list(block_ids)]
