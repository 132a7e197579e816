"""A step leaves the KV of handed-over prompts' last tokens as it came."""

from __future__ import annotations

import pytest
import torch

from cluster.kv.connector.kept import NO_SLOT, keep


def test_layers_that_share_a_mapping_are_told_once_and_in_place() -> None:
    shared, other = torch.tensor([7, 160, 3, NO_SLOT]), torch.tensor([160, 9])
    keep((160, 3), {"layer.0": shared, "layer.1": shared, "layer.2": other})
    assert shared.tolist() == [7, NO_SLOT, NO_SLOT, NO_SLOT]
    assert other.tolist() == [NO_SLOT, 9]


def test_a_batch_that_is_split_has_several_mappings() -> None:
    first, second = torch.tensor([1, 2]), torch.tensor([3, 4])
    keep((3,), [{"layer.0": first}, {"layer.0": second}])
    assert (first.tolist(), second.tolist()) == ([1, 2], [NO_SLOT, 4])


def test_a_step_without_a_mapping_is_an_error() -> None:
    with pytest.raises(ValueError, match="which slots"):
        keep((1,), {})
