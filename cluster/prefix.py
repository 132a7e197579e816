"""Names of KV blocks that routers and workers agree on: chained hashes, salted by tenant.

A block's name depends on every token up to its end and on the salt, so that equal names mean equal
prefixes of one tenant. Names are hints for placement only: a collision sends a request to a worker
that has less of its prefix than was thought, and can never show it another's KV.

With b_i a mix of block i's tokens, the chain's state is S_i = Σ_{j ≤ i} mix(b_j) · W^j (mod 2⁶⁴): a
running sum, so that numpy names a prompt of a thousand blocks in one pass, and a block's state
follows from its parent's. The name is mix(S_i + mix(salt)).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from functools import lru_cache
from operator import mul

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

FEW_TOKENS = 256
"""Up to here `few_hashes` is the quicker way."""

_TOKEN_WEIGHT = 0xD6E8FEB86659FD93
_BLOCK_WEIGHT = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def block_hashes(token_ids: Sequence[int], block_size: int, salt: str) -> Hashes:
    """The names of a prompt's full blocks, first to last."""
    states = chain(token_ids, block_size)
    return named(states, salt)


def few_hashes(token_ids: Sequence[int], block_size: int, salt: str) -> list[int]:
    """As `block_hashes`, without numpy, whose passes cost more than a short prompt's numbers."""
    names, state, weight, salted = [], 0, 1, int(_salt(salt))
    powers = _plain_powers(_TOKEN_WEIGHT, block_size)
    each_one = sum(powers)
    for first in range(0, len(token_ids) - block_size + 1, block_size):
        block = token_ids[first : first + block_size]
        total = sum(map(mul, block, powers)) + each_one
        state = state + mixed_int(total & _MASK) * weight & _MASK
        weight = weight * _BLOCK_WEIGHT & _MASK
        names.append(mixed_int(state + salted & _MASK))
    return names


def chain(token_ids: Sequence[int], block_size: int, parent: int = 0, position: int = 0) -> Hashes:
    """The chain's states after each full block of `token_ids`.

    Args:
        parent: the state after the block before; 0 at a prompt's beginning.
        position: how many blocks come before.
    """
    ids = token_ids if isinstance(token_ids, array) else array("I", token_ids)
    blocks = len(ids) // block_size
    tokens = np.frombuffer(ids, dtype=np.uint32, count=blocks * block_size).astype(np.uint64)
    sums = (tokens.reshape(blocks, block_size) + np.uint64(1)) @ _powers(_TOKEN_WEIGHT, block_size)
    weights = _powers(_BLOCK_WEIGHT, _room(position + blocks))[position : position + blocks]
    states: Hashes = np.cumsum(mixed(sums) * weights, dtype=np.uint64)
    return states + np.uint64(parent)


def named(states: Hashes, salt: str) -> Hashes:
    """The names of blocks with these states under a tenant's salt."""
    return mixed(states + _salt(salt))


def mixed(values: Hashes) -> Hashes:
    """SplitMix64's finaliser."""
    values = (values ^ (values >> _S30)) * _M1
    values = (values ^ (values >> _S27)) * _M2
    return values ^ (values >> _S31)


def mixed_int(value: int) -> int:
    """As `mixed`, of one value."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


@lru_cache(maxsize=256)
def _powers(base: int, count: int) -> Hashes:
    return np.array(_plain_powers(base, count), dtype=np.uint64)


@lru_cache(maxsize=256)
def _plain_powers(base: int, count: int) -> tuple[int, ...]:
    powers, value = [], 1
    for _ in range(count):
        powers.append(value)
        value = value * base & _MASK
    return tuple(powers)


def _room(count: int) -> int:
    """Rounded up to a power of two, so that few tables of powers are kept."""
    return 1 << max(6, (count - 1).bit_length()) if count else 64


@lru_cache(maxsize=4096)
def _salt(salt: str) -> np.uint64:
    digest = hashlib.blake2b(salt.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
