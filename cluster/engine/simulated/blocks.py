"""A KV pool with a prefix cache, as vLLM keeps one: freed blocks are reused, the oldest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks by number. A freed block keeps its content, and is found by it, until it is reused.

    Attributes:
        stored, removed: names of blocks that came into the cache and left it; the reader empties
            them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks
        self._holders = [0] * num_blocks
        self._names: list[int | None] = [None] * num_blocks
        self._by_name: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.stored: list[int] = []
        self.removed: list[int] = []

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def match(self, names: Sequence[int]) -> list[int]:
        """The blocks of the longest prefix that is here; not yet held."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder of each."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each, or None if there are not so many."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            self._forget(block)
        return blocks

    def fill(self, block: int, name: int) -> None:
        """The block is full and may be found from now on; content that is here already stays where
        it is."""
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block
            self.stored.append(name)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less of each; the last block of a prompt is reused before its first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            del self._by_name[name]
            self.removed.append(name)
