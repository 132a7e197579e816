"""Memory in pieces, filled or sent from the front."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

MAX_PIECES = 256
"""That one system call takes; Linux allows 1,024."""


class Views:
    """A sequence of pieces and how far it has been used. Nothing here looks at every piece: a
    payload has hundreds.

    Attributes:
        left: bytes that have not been used.
    """

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = list(pieces)
        self._ends = list(accumulate(map(len, self._pieces)))
        self._at = 0
        self.left = self._ends[-1] if self._ends else 0

    def front(self, limit: int) -> list[memoryview]:
        """The next whole pieces that make `limit` bytes at most, `MAX_PIECES` at most; if not even
        one does, its first `limit` bytes."""
        at, most = self._at, min(self._at + MAX_PIECES, len(self._pieces))
        stop = bisect_right(self._ends, self._used + limit, at, most)
        if stop > at or not self.left:
            return self._pieces[at:stop]
        return [self._pieces[at][:limit]]

    @property
    def _used(self) -> int:
        return self._ends[-1] - self.left if self._ends else 0

    def take(self, limit: int) -> list[memoryview]:
        """The next `limit` bytes, or what is left; they count as used."""
        taken: list[memoryview] = []
        while limit and self.left:
            part = self.front(limit)
            size = sum(map(len, part))
            self.advance(size)
            limit -= size
            taken += part
        return taken

    def advance(self, size: int) -> None:
        """So many bytes have been used."""
        self.left -= size
        used = self._used
        at = self._at = bisect_right(self._ends, used, self._at)
        if self.left:
            piece = self._pieces[at]
            self._pieces[at] = piece[used - (self._ends[at] - len(piece)) :]

    def fill(self, data: memoryview) -> list[memoryview]:
        """Copies as much of `data` as there is room for; returns where it lies now."""
        filled, done = self.take(min(len(data), self.left)), 0
        for piece in filled:
            piece[:] = data[done : done + len(piece)]
            done += len(piece)
        return filled
