"""The kernel that copies blocks of several layers takes and writes just those, however they lie."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu
LAYERS, BLOCKS, HEADS, TOKENS = 4, 6, 8, 16


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("content", [64, 12, 144])
def test_blocks_of_some_heads_and_layers(heads_first: bool, content: int) -> None:
    from cluster.kv.block_copies import BlockCopies

    device = torch.device("cuda")

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1 << 60, shape, dtype=torch.int64, device=device)

    layers = [
        drawn(BLOCKS, HEADS, TOKENS, content)
        if heads_first
        else drawn(BLOCKS, TOKENS, HEADS, content).transpose(1, 2)
        for _ in range(LAYERS)
    ]
    assert BlockCopies.fits(layers)
    copies = BlockCopies(layers)
    ids, heads = torch.tensor([5, 1, 3], device=device), range(2, 6)
    wanted = torch.stack([layer[ids][:, 2:6] for layer in layers[1:3]])
    payload = torch.empty(wanted.nbytes, dtype=torch.uint8, device=device)
    copies.gather(1, ids, heads, payload)
    assert torch.equal(payload.view(torch.int64).view(wanted.shape), wanted)

    written = drawn(*wanted.shape)
    expected = [layer.clone() for layer in layers]
    for i in (1, 2):
        expected[i][ids[:, None], torch.arange(2, 6, device=device)[None]] = written[i - 1]
    copies.scatter(1, ids, heads, written.flatten().view(torch.uint8))
    assert all(torch.equal(*pair) for pair in zip(layers, expected, strict=True))


def test_what_the_kernel_cannot_copy() -> None:
    from cluster.kv.block_copies import BlockCopies

    layer = torch.zeros(2, 2, 2, 2, dtype=torch.int64)
    assert BlockCopies.fits([layer])
    assert not BlockCopies.fits([layer, layer.transpose(1, 2)])
    assert not BlockCopies.fits([layer.transpose(2, 3)])
    assert not BlockCopies.fits([layer.to(torch.int32)])
