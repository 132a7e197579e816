"""The order in which an attention kernel keeps the items of a block.

GPU backends keep a block plain: one token's K and V after the other's. vLLM's CPU kernels pack it
for the instruction set at hand. The order is not guessed but learned: a block of numbered items is
written through the kernel's own cache write, and read back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.kv.geometry import PLAIN

_DIGIT = 128
"""Item numbers are written digit by digit, each exact in every floating-point type of a cache."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Of one head of one block.

    Attributes:
        name: equal for two caches of the same block size whose blocks are ordered alike.
        order: for each item in plain order, `[tokens, content]` flattened, where it lies; None if
            the block is plain.
    """

    tokens: int
    content: int
    name: str = PLAIN
    order: torch.Tensor | None = None


def learn_cpu_packing(
    tokens: int, content: int, dtype: torch.dtype, kv_cache_dtype: str, isa: str
) -> Packing:
    """The order of vLLM's CPU attention for an instruction set.

    Raises:
        ValueError: what came back is no permutation of what was written; or the cache is
            quantised, so that numbers do not come back.
    """
    from vllm import _custom_ops as ops

    if kv_cache_dtype not in ("auto", str(dtype).removeprefix("torch.")):
        raise ValueError(f"a {kv_cache_dtype} cache on a CPU keeps its packing to itself")
    total = tokens * content
    numbers = torch.arange(total).view(tokens, content)
    slots = torch.arange(tokens)
    found = torch.zeros(total, dtype=torch.int64)
    weight = 1
    while weight < total:
        digit = (numbers // weight % _DIGIT).to(dtype)
        cache = torch.zeros(1, 1, tokens, content, dtype=dtype)
        keys, values = cache.view(1, 1, tokens * 2, -1).chunk(2, dim=2)
        half = content // 2
        ops.cpu_attn_reshape_and_cache(
            digit[:, None, :half].contiguous(),
            digit[:, None, half:].contiguous(),
            keys,
            values,
            slots,
            isa,
        )
        found += cache.flatten().to(torch.int64) * weight
        weight *= _DIGIT
    order = torch.empty(total, dtype=torch.int64)
    order[found] = torch.arange(total)
    if not torch.equal(found.sort().values, torch.arange(total)):
        raise ValueError(f"the CPU attention's {isa} packing could not be learned")
    if torch.equal(order, torch.arange(total)):
        return Packing(tokens, content)
    return Packing(tokens, content, f"cpu-{isa}", order)
