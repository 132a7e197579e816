"""Blocks of several layers in and out of a payload by one kernel, for caches on a GPU.

One launch a frame: an operation per layer costs a transfer more host time than the copy itself
takes. Imported only where there is a GPU, which is where Triton is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["index", "first_layer", "first_head", "num_blocks", "num_heads"])
def _copy(  # type: ignore[no-untyped-def]
    layers,
    index,
    payload,
    first_layer,
    first_head,
    num_blocks,
    num_heads,
    block_stride,
    head_stride,
    token_stride,
    TOKENS: tl.constexpr,
    CONTENT: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
):
    """A program per (layer, block, head); payloads are `[layers, blocks, heads, tokens, content]`.

    Strides and sizes count 8-byte words; WIDTH is the power of two that holds a head's block.
    """
    program = tl.program_id(0)
    head = program % num_heads
    block = program // num_heads % num_blocks
    layer = program // (num_heads * num_blocks)
    base = tl.load(layers + first_layer + layer).to(tl.pointer_type(tl.int64))
    number = tl.load(index + block)
    start = base + number * block_stride + (first_head + head) * head_stride
    word = tl.arange(0, WIDTH)
    held = word < TOKENS * CONTENT
    cached = start + word // CONTENT * token_stride + word % CONTENT
    moved = payload + program.to(tl.int64) * (TOKENS * CONTENT) + word
    if GATHER:
        tl.store(moved, tl.load(cached, mask=held), mask=held)
    else:
        tl.store(cached, tl.load(moved, mask=held), mask=held)


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
        """They can be copied so: their rows are whole words, and they are strided alike."""
        return (
            layers[0].element_size() == 8
            and layers[0].stride(3) == 1
            and len({layer.stride() for layer in layers}) == 1
        )

    def _warm_up(self, first: torch.Tensor) -> None:
        """Compiles now, with a block that is written as it was read."""
        index = torch.zeros(1, dtype=torch.int64, device=first.device)
        heads = range(first.shape[1])
        payload = torch.empty(first[0].nbytes, dtype=torch.uint8, device=first.device)
        self.gather(0, index, heads, payload)
        self.scatter(0, index, heads, payload)

    def gather(
        self, first_layer: int, index: torch.Tensor, heads: range, payload: torch.Tensor
    ) -> None:
        """From the cache into `payload`, uint8, on the current stream.

        Args:
            index: int64 block ids, on the device.
            heads: of the cache.
        """
        self._run(first_layer, index, heads, payload, gather=True)

    def scatter(
        self, first_layer: int, index: torch.Tensor, heads: range, payload: torch.Tensor
    ) -> None:
        """From `payload` into the cache."""
        self._run(first_layer, index, heads, payload, gather=False)

    def _run(
        self,
        first_layer: int,
        index: torch.Tensor,
        heads: range,
        payload: torch.Tensor,
        gather: bool,
    ) -> None:
        size = self._tokens * self._content
        words = payload.view(torch.int64)
        _copy[(words.numel() // size,)](
            self._layers,
            index,
            words,
            first_layer,
            heads.start,
            len(index),
            len(heads),
            *self._strides,
            TOKENS=self._tokens,
            CONTENT=self._content,
            WIDTH=self._width,
            GATHER=gather,
        )
