"""Which workers hold which prefix blocks: fed by their KV events, asked at every placement. Pure.

A table of buckets of eight cells; a block's name leads to two buckets and is in one of them, so a
thousand names are looked up in a few numpy passes, whatever is in the table. A cell holds the name
and the number of a *set* of workers. Blocks of one prompt have the same holders, so sets are few:
going through a prompt's blocks is going through the few places where the set changes, and a worker
that ends is taken out of the sets, not of millions of cells.

It is a hint: a block that finds no cell is forgotten, and an answer may be older than the truth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.prefix import Hashes, mixed, mixed_int

WAYS = 8
FILL = 0.7
"""Of the cells; beyond, buckets begin to overflow."""

CELL_BYTES = 12

Cells = NDArray[np.int64]


class PrefixIndex:
    """Holders by block name; a holder is a small number, such as a slot of the fleet.

    Args:
        blocks: about how many it can keep. Memory is CELL_BYTES / FILL bytes a block, rounded up
            to a power of two, and does not grow.
    """

    def __init__(self, blocks: int) -> None:
        buckets = 1 << max(4, int(np.ceil(np.log2(blocks / FILL / WAYS))))
        self._names = np.zeros(buckets * WAYS, dtype=np.uint64)
        self._sets = np.zeros(buckets * WAYS, dtype=np.uint32)  # 0: the cell is free
        self._mask = np.uint64(buckets - 1)
        self._bits: list[int] = [0]  # a set's holders, by its number
        self._numbers: dict[int, int] = {}  # the number of a set with these holders
        self._cells = np.zeros(64, dtype=np.int64)  # that refer to a set, by its number
        self._empty = np.ones(64, dtype=bool)  # sets that nobody is in any more
        self._unused: list[int] = []
        self.version = 0
        """Changes when somebody holds something else."""
        self.dropped = 0
        """Blocks that found no cell."""

    def __len__(self) -> int:
        """Blocks that somebody holds."""
        return int(self._cells[~self._empty].sum())

    @property
    def bytes(self) -> int:
        """Of the table; sets come on top, a few hundred bytes each."""
        return self._names.nbytes + self._sets.nbytes

    def held(self, names: Hashes | list[int]) -> dict[int, int]:
        """How many of a prompt's leading blocks each worker holds; those with none are left out.

        Args:
            names: in a list where they are few: they are looked up one by one then.
        """
        if isinstance(names, list):
            return self._held_few(names)
        if not len(names) or self._cell(int(names[0])) < 0:  # Most prompts are new to all.
            return {}
        cells = self._find(names)
        missing = np.flatnonzero(cells < 0)
        sets = self._sets[cells[: missing[0]] if len(missing) else cells]
        changes = [0, *(np.flatnonzero(sets[1:] != sets[:-1]) + 1).tolist()]
        depths: dict[int, int] = {}
        alive = self._bits[sets[0]]
        for place in changes[1:]:
            still = alive & self._bits[sets[place]]
            _each(alive & ~still, place, depths)
            alive = still
            if not alive:
                return depths
        _each(alive, len(sets), depths)
        return depths

    def add(self, holder: int, names: Hashes) -> None:
        """`holder` has these blocks now."""
        self.version += 1
        names = np.unique(names)
        cells = self._find(names)
        known = cells >= 0
        self._move(cells[known], 1 << holder, 0)
        if not known.all():
            self._insert(names[~known], self._number(1 << holder))

    def remove(self, holder: int, names: Hashes) -> None:
        """`holder` has them no more."""
        self.version += 1
        cells = self._find(np.unique(names))
        self._move(cells[cells >= 0], 0, 1 << holder)

    def forget(self, holder: int) -> None:
        """Nothing it had counts any more; its number may be given to another."""
        self.version += 1
        bit = 1 << holder
        for number, bits in enumerate(self._bits):
            if bits & bit:
                self._bits[number] = bits & ~bit
                self._empty[number] = not self._bits[number]
        self._numbers = {bits: number for number, bits in enumerate(self._bits) if bits}

    def _held_few(self, names: list[int]) -> dict[int, int]:
        depths: dict[int, int] = {}
        alive = -1  # everybody
        place = 0
        for place, name in enumerate(names):
            cell = self._cell(name)
            still = alive & self._bits[self._sets.item(cell)] if cell >= 0 else 0
            if place:
                _each(alive & ~still, place, depths)
            alive = still
            if not alive:
                return depths
        if names:
            _each(alive, place + 1, depths)
        return depths

    def _cell(self, name: int) -> int:
        """One name's cell, or -1."""
        mask = int(self._mask)
        for bucket in (name & mask, mixed_int(name) & mask):
            cells: list[int] = self._names[bucket * WAYS : (bucket + 1) * WAYS].tolist()
            if name in cells:
                return bucket * WAYS + cells.index(name)
        return -1

    def _find(self, names: Hashes) -> Cells:
        """Each name's cell, or -1."""
        found = np.full(len(names), -1, dtype=np.int64)
        pending = np.arange(len(names))
        for bucket in self._buckets(names):
            first = bucket[pending] * WAYS
            hits = self._names[first[:, None] + _WAY] == names[pending, None]
            here = hits.any(axis=1)
            found[pending[here]] = first[here] + hits[here].argmax(axis=1)
            pending = pending[~here]
            if not len(pending):
                break
        return found

    def _buckets(self, names: Hashes) -> tuple[Cells, Cells]:
        one = names & self._mask
        other = mixed(names) & self._mask
        return one.astype(np.int64), other.astype(np.int64)

    def _insert(self, names: Hashes, number: int) -> None:
        """Puts new names into the emptier of their buckets, those that collide a round later."""
        for _ in range(2 * WAYS):
            rows = np.arange(len(names))
            firsts = np.stack(self._buckets(names)) * WAYS
            cells = firsts[:, :, None] + _WAY
            free = self._empty[self._sets[cells]]
            better = free.sum(axis=2).argmax(axis=0)
            free, cells = free[better, rows], cells[better, rows]
            room = free.any(axis=1)
            self.dropped += len(names) - int(room.sum())
            chosen = cells[rows, free.argmax(axis=1)][room]
            names = names[room]
            chosen, first = np.unique(chosen, return_index=True)
            self._put(chosen, number)
            self._names[chosen] = names[first]
            names = np.delete(names, first)
            if not len(names):
                break
        self.dropped += len(names)

    def _move(self, cells: Cells, more: int, less: int) -> None:
        """Changes the holders of what is in `cells`."""
        if not len(cells):
            return
        sets, which = np.unique(self._sets[cells], return_inverse=True)
        for i, number in enumerate(sets.tolist()):
            bits = (self._bits[number] | more) & ~less
            if bits != self._bits[number]:
                self._put(cells[which == i], self._number(bits))

    def _put(self, cells: Cells, number: int) -> None:
        """Makes `cells` refer to a set, and frees the sets that nothing refers to any more."""
        before, counts = np.unique(self._sets[cells], return_counts=True)
        self._sets[cells] = number
        if number == 0:
            self._names[cells] = 0
        self._cells[number] += len(cells)
        self._cells[before] -= counts
        for old in before[self._cells[before] <= 0].tolist():
            if old and old != number:
                if self._numbers.get(self._bits[old]) == old:
                    del self._numbers[self._bits[old]]
                self._bits[old], self._empty[old] = 0, True
                self._unused.append(old)

    def _number(self, bits: int) -> int:
        if not bits:
            return 0
        number = self._numbers.get(bits)
        if number is None:
            number = self._unused.pop() if self._unused else len(self._bits)
            if number == len(self._bits):
                self._bits.append(0)
            if number == len(self._cells):
                self._cells = np.concatenate([self._cells, np.zeros_like(self._cells)])
                self._empty = np.concatenate([self._empty, np.ones_like(self._empty)])
            self._bits[number], self._numbers[bits], self._empty[number] = bits, number, False
            self._cells[number] = 0
        return number


_WAY = np.arange(WAYS)


_FEW = 8


def _each(bits: int, depth: int, depths: dict[int, int]) -> None:
    if bits.bit_count() > _FEW:
        # One pass over the bytes: taking bit after bit off a long number copies it every time.
        raw = np.frombuffer(bits.to_bytes((bits.bit_length() + 7) // 8, "little"), dtype=np.uint8)
        holders = np.flatnonzero(np.unpackbits(raw, bitorder="little"))
        depths.update(dict.fromkeys(holders.tolist(), depth))
        return
    while bits:
        low = bits & -bits
        depths[low.bit_length() - 1] = depth
        bits ^= low
