"""Slots of the KV cache that a step is not to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

NO_SLOT = -1
"""Attention kernels write no KV for a token with it, as for those that pad a CUDA graph."""

SlotMapping = Mapping[str, torch.Tensor]


def keep(slots: Sequence[int], mapping: SlotMapping | Sequence[SlotMapping]) -> None:
    """Queues that the step's tokens with these slots leave their KV as it is.

    In place: the step's layers share the tensors, and its CUDA graph reads them where they are.

    Args:
        mapping: slots by token, int64, for each layer's name; several where vLLM splits the batch.

    Raises:
        ValueError: the step has no such mapping.
    """
    parts = [mapping] if isinstance(mapping, Mapping) else list(mapping)
    tensors = {tensor.data_ptr(): tensor for part in parts for tensor in part.values()}
    if not tensors:
        raise ValueError("the step says nowhere which slots it writes")
    for tensor in tensors.values():
        for slot in slots:
            tensor.masked_fill_(tensor == slot, NO_SLOT)
