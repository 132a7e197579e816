"""Checksums of payloads where they lie."""

from __future__ import annotations

from functools import cache

import torch
import xxhash

_MASK = (1 << 64) - 1


def host_checksum(payload: torch.Tensor, seed: int) -> int:
    """XXH3-64 of a payload in host memory."""
    return xxhash.xxh3_64_intdigest(payload.numpy(), seed=seed)


def device_checksum(payload: torch.Tensor, seed: int) -> int:
    """Of a payload on a device, computed there; never 0.

    A sum of the payload's 32-bit words, each times an odd number of its place (modulo 2^32): any
    changed word, and almost any exchange of words, changes it. Waits for the device.
    """
    words = payload[: payload.numel() // 4 * 4].view(torch.int32)
    total = int((words * _weights(payload.device, words.numel())).sum(dtype=torch.int64))
    tail = int(payload[words.numel() * 4 :].sum(dtype=torch.int64))
    return ((total * 0x9E3779B97F4A7C15 + tail + seed) & _MASK) or 1


def _weights(device: torch.device, count: int) -> torch.Tensor:
    size = 1 << max(16, (count - 1).bit_length())
    return _all_weights(device, size)[:count]


@cache
def _all_weights(device: torch.device, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(-(1 << 31), 1 << 31, (size,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(torch.int32).to(device)
