"""What a router is told of the engine's prefix cache: all of it first, then the changes."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.engine.blocks import HeldBlocks

GATHER_SECONDS = 0.1
"""Changes wait so long for others, because a message costs a router more than a block does."""

MAX_NAMES = 1 << 18
"""Per message: two megabytes."""


@dataclass(frozen=True)
class BlockChanges:
    """Names of `cluster.prefix`, packed as little-endian uint64.

    Attributes:
        reset: what was told before counts no more.
    """

    reset: bool
    stored: bytes
    removed: bytes


class BlockReporter:
    """Tells one router, until it is cancelled."""

    def __init__(self, held: HeldBlocks, put: Callable[[BlockChanges], None]) -> None:
        self._held = held
        self._put = put
        self._stored: dict[int, None] = {}
        self._removed: dict[int, None] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """The whole now, changes from then on."""
        stop = self._held.listen(self._see)
        try:
            names = list(self._held.names)
            self._put(BlockChanges(True, b"", b""))
            for i in range(0, len(names), MAX_NAMES):
                self._put(BlockChanges(False, _packed(names[i : i + MAX_NAMES]), b""))
            while True:
                await self._changed.wait()
                await asyncio.sleep(GATHER_SECONDS)
                self._changed.clear()
                stored, self._stored = self._stored, {}
                removed, self._removed = self._removed, {}
                self._put(BlockChanges(False, _packed(stored), _packed(removed)))
        finally:
            stop()

    def _see(self, stored: Sequence[int], removed: Sequence[int]) -> None:
        """The last word on a name counts; the two lists never share one."""
        for name in removed:
            self._stored.pop(name, None)
            self._removed[name] = None
        for name in stored:
            self._removed.pop(name, None)
            self._stored[name] = None
        self._changed.set()


def _packed(names: Iterable[int]) -> bytes:
    listed = list(names)
    return struct.pack(f"<{len(listed)}Q", *listed)
