"""Checksums of payloads where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import xxhash

from cluster.kv.transport.frames import CHECKSUM_BYTES, blocks_checksum
from cluster.kv.transport.streams.views import Views

_MASK = (1 << 64) - 1
_FACTOR = 0x1E3779B97F4A7C15
PART_BYTES = 4 << 20
_PARTS = 4
AT_ONCE_BYTES = _PARTS * PART_BYTES
"""More at once takes more memory, less takes more of the engine's Python."""


def host_checksum(payload: torch.Tensor, seed: int) -> int:
    """XXH3-64 of a payload in host memory."""
    return xxhash.xxh3_64_intdigest(payload.numpy(), seed=seed)


class PassingSum:
    """XXH3-64 of a payload that passes in pieces.

    Args:
        size: of the payload; what passes behind it does not count.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._left = size
        self._digest = xxhash.xxh3_64(seed=seed)

    def add(self, pieces: Sequence[memoryview]) -> None:
        """In order."""
        size = sum(map(len, pieces))
        if size > self._left:
            pieces = Views(pieces).take(self._left)
            size = self._left
        self._left -= size
        for piece in pieces:
            self._digest.update(piece)

    def value(self) -> int:
        return int(self._digest.intdigest())


class ChecksumSeal:
    """The end of a frame of blocks, for a payload that is being sent. Memory that changes between
    its sending and its sum makes another sum; that it had changed before, generations tell."""

    size = CHECKSUM_BYTES

    def __init__(self, passing: PassingSum) -> None:
        self._passing = passing
        self.add = passing.add

    def end(self) -> bytes:
        return blocks_checksum(self._passing.value())


class DeviceSum:
    """A running checksum of payloads, computed where they lie, in the order they are added in.

    Each part of a payload counts with the sum of its 32-bit words, each times an odd number of its
    place (modulo 2^32): any changed word, and almost any exchange of words, changes it. Nothing
    waits for the device.

    Args:
        stream: on which it is computed; None on the host.
        seed: so that another handoff's payloads never match.
    """

    def __init__(self, device: torch.device, stream: Any, seed: int) -> None:
        self._stream = stream
        self._weights, self._powers = _weights(device)
        with torch.cuda.stream(stream):
            self._sum = torch.full((), seed - (1 << 63), dtype=torch.int64, device=device)

    def add(self, payload: torch.Tensor) -> None:
        """Of uint8, flat; it may not change before the stream has got past this point."""
        whole = payload.numel() // PART_BYTES * PART_BYTES
        with torch.cuda.stream(self._stream):
            for start in range(0, whole, AT_ONCE_BYTES):
                parts = payload[start : min(start + AT_ONCE_BYTES, whole)]
                words = parts.view(torch.int32).view(-1, PART_BYTES // 4)
                sums = (words * self._weights).sum(1, dtype=torch.int64)
                counted = (sums * self._powers[-len(sums) :]).sum()
                self._sum.mul_(_signed(_FACTOR ** len(sums))).add_(counted)
            rest = payload[whole:]
            words = rest[: rest.numel() // 4 * 4].view(torch.int32)
            for last in (words * self._weights[: words.numel()], rest[4 * words.numel() :]):
                if last.numel():
                    self._sum.mul_(_FACTOR).add_(last.sum(dtype=torch.int64))

    def fetch(self) -> torch.Tensor:
        """The sum so far, int64 on the host, there once the stream has got past this point; see
        `value`."""
        with torch.cuda.stream(self._stream):
            if not self._sum.is_cuda:
                return self._sum.clone()
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
            return host.copy_(self._sum, non_blocking=True)


def value(fetched: torch.Tensor) -> int:
    """A checksum of 64 bits; never 0."""
    return (int(fetched) & _MASK) or 1


@cache
def _weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the words of a part, and of parts that are counted at once."""
    generator = torch.Generator().manual_seed(7)
    words = PART_BYTES // 4
    drawn = torch.randint(-(1 << 31), 1 << 31, (words,), generator=generator, dtype=torch.int64)
    powers = torch.tensor([_signed(_FACTOR**i) for i in reversed(range(_PARTS))])
    return (drawn | 1).to(torch.int32).to(device), powers.to(device)


def _signed(number: int) -> int:
    """Modulo 2^64, as an int64."""
    return (number + (1 << 63) & _MASK) - (1 << 63)
