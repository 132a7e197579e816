"""Blocks of several layers in and out of a payload by one kernel, for caches on a GPU.

One launch a frame: an operation per layer costs a transfer more host time than the copy itself
takes. Imported only where there is a GPU, which is where Triton is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from cluster.kv.transport.checksums import FACTOR, PLACES, DeviceSum, Tally


@triton.jit(
    do_not_specialize=["index", "first_layer", "first_head", "num_blocks", "num_heads", "sequence"]
)
def _copy(  # type: ignore[no-untyped-def]
    layers,
    index,
    payload,
    total,
    first_layer,
    first_head,
    num_blocks,
    num_heads,
    sequence,
    BLOCK_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CONTENT: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    COUNT: tl.constexpr,
    FACTOR: tl.constexpr,
    PLACES: tl.constexpr,
):
    """A program per (layer, block, head); payloads are `[layers, blocks, heads, tokens, content]`.

    Strides and sizes count 8-byte words; WIDTH is the power of two that holds a head's block. COUNT
    adds what passes to `total`, as `Tally.count` does.
    """
    program = tl.program_id(0)
    head = program % num_heads
    block = program // num_heads % num_blocks
    layer = program // (num_heads * num_blocks)
    base = tl.multiple_of(tl.load(layers + first_layer + layer), 16)
    number = tl.load(index + block)
    start = number * BLOCK_STRIDE + (first_head + head) * HEAD_STRIDE
    word = tl.arange(0, WIDTH)
    held = word < TOKENS * CONTENT
    if TOKEN_STRIDE == CONTENT:
        place = start + word
    else:
        place = start + word // CONTENT * TOKEN_STRIDE + word % CONTENT
    cached = base.to(tl.pointer_type(tl.int64)) + place
    first = program.to(tl.int64) * (TOKENS * CONTENT)
    moved = payload + first + word
    if GATHER:
        words = tl.load(cached, mask=held, other=0)
        tl.store(moved, words, mask=held)
    else:
        words = tl.load(moved, mask=held, other=0)
        tl.store(cached, words, mask=held)
    if COUNT:
        mixed = ((sequence.to(tl.int64) << PLACES) + first + word) * FACTOR
        folded = words ^ (words >> 32) ^ (words >> 63)
        tl.atomic_add(total, tl.sum(folded * (mixed ^ (mixed >> 32) | 1), 0), sem="relaxed")


class BlockCopies:
    """Copies between a cache's layers and payloads on the same device.

    Args:
        layers: int64 views `[blocks, heads, tokens, content]`, of equal strides, the last one 1.
    """

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        first = layers[0]
        self._strides = first.stride()[:3]
        self._tokens, self._content = first.shape[2:]
        self._width = triton.next_power_of_2(self._tokens * self._content)
        self._layers = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64)
        self._layers = self._layers.to(first.device)
        self._warm_up(first)

    @staticmethod
    def fits(layers: Sequence[torch.Tensor]) -> bool:
        """They can be copied so: their rows are whole words, they are strided alike, and begin
        where devices read several words at once."""
        return (
            layers[0].element_size() == 8
            and layers[0].stride(3) == 1
            and len({layer.stride() for layer in layers}) == 1
            and not any(layer.data_ptr() % 16 for layer in layers)
        )

    def _warm_up(self, first: torch.Tensor) -> None:
        """Compiles now, with a block that is written as it was read."""
        index = torch.zeros(1, dtype=torch.int64, device=first.device)
        heads = range(first.shape[1])
        payload = torch.empty(first[0].nbytes, dtype=torch.uint8, device=first.device)
        tally = Tally(DeviceSum(first.device, torch.cuda.current_stream(first.device), 0), 0)
        with torch.cuda.device(first.device):  # Triton's is the current one, whatever it is given
            for counted in (None, tally):
                self.gather(0, index, heads, payload, counted)
                self.scatter(0, index, heads, payload, counted)

    def gather(
        self,
        first_layer: int,
        index: torch.Tensor,
        heads: range,
        payload: torch.Tensor,
        tally: Tally | None = None,
    ) -> None:
        """From the cache into `payload`, uint8, on the current stream.

        Args:
            index: int64 block ids, on the device.
            heads: of the cache.
            tally: counts the payload.
        """
        self._run(first_layer, index, heads, payload, tally, gather=True)

    def scatter(
        self,
        first_layer: int,
        index: torch.Tensor,
        heads: range,
        payload: torch.Tensor,
        tally: Tally | None = None,
    ) -> None:
        """From `payload` into the cache."""
        self._run(first_layer, index, heads, payload, tally, gather=False)

    def _run(
        self,
        first_layer: int,
        index: torch.Tensor,
        heads: range,
        payload: torch.Tensor,
        tally: Tally | None,
        gather: bool,
    ) -> None:
        size = self._tokens * self._content
        words = payload.view(torch.int64)
        _copy[(words.numel() // size,)](
            self._layers,
            index,
            words,
            self._layers if tally is None else tally.sum.total,
            first_layer,
            heads.start,
            len(index),
            len(heads),
            0 if tally is None else tally.sequence,
            *self._strides,
            self._tokens,
            self._content,
            self._width,
            gather,
            tally is not None,
            FACTOR,
            PLACES,
        )
