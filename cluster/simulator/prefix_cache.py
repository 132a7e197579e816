"""A worker's prefix cache: block hashes, the least recently used leave first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixCache:
    """Hashes of blocks that are chained: a block is of use only with all before it.

    Args:
        capacity: blocks; 0 caches nothing.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def held(self, blocks: Sequence[int]) -> int:
        """How many leading blocks it holds; they count as used."""
        count = 0
        for block in blocks:
            if block not in self._blocks:
                break
            count += 1
        for block in reversed(blocks[:count]):  # so that the tail of a prefix leaves first
            self._blocks.move_to_end(block)
        return count

    def put(self, blocks: Sequence[int]) -> None:
        """Takes in all of a prompt's blocks, and drops what there is no room for."""
        if not self._capacity:
            return
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
