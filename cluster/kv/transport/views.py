"""Tensors over memory that Python owns."""

from __future__ import annotations

import warnings

import numpy as np
import torch

# Payloads that arrived are read-only memory that is only ever copied from; torch warns of that once
# a process.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"\0", dtype=np.uint8))


def bytes_view(data: bytes) -> torch.Tensor:
    """uint8 `[len(data)]`, the same memory."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8))
