"""A link's checksum, where kernels do not count in passing."""

from __future__ import annotations

import pytest
import torch

from cluster.kv.transport.checksums import AT_ONCE_BYTES, DeviceSum, Tally, value


def summed(*payloads: torch.Tensor, seed: int = 5, first: int = 0) -> int:
    running = DeviceSum(torch.device("cpu"), None, seed)
    for sequence, payload in enumerate(payloads, first):
        Tally(running, sequence).count(payload)
    return value(running.fetch())


def test_a_device_checksum_sees_every_byte_their_order_and_that_of_payloads() -> None:
    payload = torch.arange(103, dtype=torch.uint8)
    right = summed(payload)
    assert right and summed(payload.clone()) == right
    assert summed(payload, seed=6) != right
    for at in range(len(payload)):
        changed = payload.clone()
        changed[at] ^= 1
        assert summed(changed) != right
    swapped = payload.clone()
    swapped[0:8], swapped[8:16] = payload[8:16], payload[0:8]
    assert summed(swapped) != right
    other = payload + 1
    assert summed(payload, other) != summed(other, payload)
    assert summed(payload, payload) != summed(payload)


def test_a_device_checksum_sees_the_place_in_a_large_payload() -> None:
    payload = torch.zeros(2 * AT_ONCE_BYTES + 7, dtype=torch.uint8)
    payload[0] = 1
    moved = torch.zeros_like(payload)
    moved[AT_ONCE_BYTES] = 1
    assert len({summed(payload), summed(moved), summed(torch.zeros_like(payload))}) == 3


def test_a_device_checksum_is_the_sum_of_weighted_words() -> None:
    """As anybody can compute it: on a device it is taken by the kernel that copies the blocks."""
    payload = torch.randint(0, 256, (AT_ONCE_BYTES + 80,), dtype=torch.uint8)
    total, seed, sequence = 0, 5, 3
    for number, word in enumerate(payload.numpy().view("<u8").tolist()):
        if word and (number < 4 or number > len(payload) // 8 - 12):
            mixed = ((sequence << 40) + number) * 0x1E3779B97F4A7C15 % 2**64
            signed = mixed - 2**64 if mixed >= 2**63 else mixed
            folded = word ^ word >> 32 ^ (0xFFFFFFFF if word >> 63 else 0)
            total += folded * ((signed ^ (signed >> 32)) | 1)
    few = payload.clone()
    few[32 : -11 * 8] = 0
    assert summed(few, seed=seed, first=sequence) == (total + seed + 2**63) % 2**64


@pytest.mark.parametrize("bit", [0, 31, 32, 50, 62, 63])
@pytest.mark.parametrize("held", ["zeros", "anything"])
def test_a_device_checksum_sees_the_same_bit_of_two_words(bit: int, held: str) -> None:
    """Changed in both, or moved from one to the other."""
    drawn = torch.Generator().manual_seed(bit)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (65,), generator=drawn)
    words &= ~(1 << bit if bit < 63 else -(1 << 63)) if held == "anything" else 0
    flip = torch.tensor(1 << bit if bit < 63 else -(1 << 63))
    pairs = [(first, second) for first in range(0, 64, 9) for second in range(first + 1, 65)]
    sums = set()
    for changed in [(), *((place,) for place in range(65)), *pairs]:
        damaged = words.clone()
        damaged[list(changed)] ^= flip
        sums.add(summed(damaged.view(torch.uint8)))
    assert len(sums) == 1 + 65 + len(pairs), "each of them makes another sum"
