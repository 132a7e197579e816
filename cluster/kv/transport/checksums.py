"""Checksums of payloads where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from cluster.kv.transport.frames import CHECKSUM_BYTES, blocks_checksum
from cluster.kv.transport.streams.views import Views

_MASK = (1 << 64) - 1
FACTOR = 0x1E3779B97F4A7C15
"""Odd. The weight of the word at place p is p × FACTOR modulo 2^64, its halves mixed, made odd."""
PLACES = 40
"""Bits of a word's number within its payload; above them is the payload's within its push."""

AT_ONCE_BYTES = 8 << 20
"""More at once takes more memory, less takes more of the engine's Python."""


def seed_of(handoff_id: str) -> int:
    """Seeds checksums, so that another handoff's frame never matches."""
    return int(handoff_id[:16], 16)


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
    """A running checksum of payloads, computed where they lie: the sum of their 64-bit words, each
    folded and then times an odd number of its place (modulo 2^64). One changed word always changes
    it, and almost any other damage or exchange of words does: folding brings a word's high bits
    down, for of those that a product has above them few depend on the place, of the top bit none.
    They may be counted in any order, and nothing waits for the device.

    Args:
        stream: on which it is computed; None on the host.
        seed: so that another handoff's payloads never match.

    Attributes:
        total: int64, on the device.
    """

    def __init__(self, device: torch.device, stream: Any, seed: int) -> None:
        self._stream = stream
        with torch.cuda.stream(stream):
            self.total = torch.full((1,), seed - (1 << 63), dtype=torch.int64, device=device)

    def fetch(self) -> torch.Tensor:
        """The sum so far, int64 on the host, there once the stream has got past this point; see
        `value`."""
        with torch.cuda.stream(self._stream):
            if not self.total.is_cuda:
                return self.total.clone()
            host = torch.empty(1, dtype=torch.int64, pin_memory=True)
            return host.copy_(self.total, non_blocking=True)


@dataclass(frozen=True)
class Tally:
    """Counts one payload for a checksum, in passing: whoever copies it.

    Attributes:
        sequence: of the payload in its push.
    """

    sum: DeviceSum
    sequence: int

    def count(self, payload: torch.Tensor) -> None:
        """Of uint8, flat, on the current stream, for copies that do not do it in passing."""
        whole = payload.numel() // 8 * 8
        words = payload[:whole].view(torch.int64)
        if rest := payload.numel() - whole:
            last = torch.zeros(8, dtype=torch.uint8, device=payload.device)
            last[:rest] = payload[whole:]
            words = torch.cat([words, last.view(torch.int64)])
        for start in range(0, len(words), AT_ONCE_BYTES // 8):
            part = words[start : start + AT_ONCE_BYTES // 8]
            first = (self.sequence << PLACES) + start
            mixed = torch.arange(first, first + len(part), device=part.device) * FACTOR
            weights = mixed ^ mixed >> 32 | 1
            # The high half stays, the low one is crossed with it and its sign: this can be undone.
            folded = part ^ part >> 32 ^ part >> 63
            self.sum.total += (folded * weights).sum()


def value(fetched: torch.Tensor) -> int:
    """A checksum of 64 bits; never 0."""
    return (int(fetched) & _MASK) or 1
