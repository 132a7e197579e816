"""Memory in pieces, filled or sent from the front."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PIECES = 256
"""That one system call takes; Linux allows 1,024."""


class Views:
    """A sequence of pieces and how far it has been used.

    Attributes:
        left: bytes that have not been used.
    """

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = list(pieces)
        self._at = 0
        self.left = sum(map(len, self._pieces))

    def front(self, limit: int) -> list[memoryview]:
        """The next pieces, of `limit` bytes together and of `MAX_PIECES` at most."""
        taken = self._pieces[self._at : self._at + MAX_PIECES]
        size = 0
        for i, piece in enumerate(taken):
            size += len(piece)
            if size >= limit:
                taken[i] = piece[: len(piece) - (size - limit)]
                return taken[: i + 1]
        return taken

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
        while size:
            piece = self._pieces[self._at]
            if size < len(piece):
                self._pieces[self._at] = piece[size:]
                return
            size -= len(piece)
            self._at += 1

    def fill(self, data: memoryview) -> int:
        """Copies from `data`; returns how many bytes there was room for."""
        done = 0
        for piece in self.take(min(len(data), self.left)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)
        return done
