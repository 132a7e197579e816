"""Which prefix blocks an engine holds, by the names of `cluster.prefix`, as it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Listener = Callable[[Sequence[int], Sequence[int]], None]
"""Of the names that came, and of those that went."""


class HeldBlocks:
    """The set, and who wants to hear of its changes. All of it on the front end's event loop."""

    def __init__(self) -> None:
        self._names: set[int] = set()
        self._listeners: list[Listener] = []

    @property
    def names(self) -> frozenset[int]:
        """All that are held now."""
        return frozenset(self._names)

    def change(self, stored: Iterable[int], removed: Iterable[int]) -> None:
        """Blocks came and went; a name in both was gone before it came."""
        gone = [name for name in removed if name in self._names]
        self._names.difference_update(gone)
        new = [name for name in dict.fromkeys(stored) if name not in self._names]
        self._names.update(new)
        if new or gone:
            for listener in self._listeners:
                listener(new, gone)

    def clear(self) -> None:
        """The cache was emptied."""
        self.change((), list(self._names))

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` with every change until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)
