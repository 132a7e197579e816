"""A link's memory at one end: equal slots, as many at either end.

A payload lies in the slot of the same number on both sides, so that whoever fills one knows where
it will land. The sender takes slots, the receiver gives them back: a slot is free once its payload
has been read where it landed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from cluster.errors import HandoffRefused
from cluster.kv.transport.staging import Slot


class LinkSlots:
    """Lives on the agent's event loop.

    Args:
        memory: uint8, `[slots, bytes of a slot]`.
        unused: called once when the link is closed and every slot is free: nothing touches the
            memory any more.
    """

    def __init__(self, memory: torch.Tensor, unused: Callable[[], None]) -> None:
        self._memory = memory
        self._unused = unused
        self._free: asyncio.Queue[int | None] = asyncio.Queue()
        self._taken: set[int] = set()
        self._closed = ""
        for index in range(len(memory)):
            self._free.put_nowait(index)

    @property
    def slot_bytes(self) -> int:
        return int(self._memory.shape[1])

    @property
    def free(self) -> int:
        """How many are free."""
        return len(self._memory) - len(self._taken)

    async def take(self, size: int) -> Slot:
        """Waits for a free slot. Raises HandoffRefused if the link is closed."""
        if size > self.slot_bytes:
            raise ValueError(f"a payload of {size} bytes in slots of {self.slot_bytes}")
        index = await self._free.get()
        if index is None or self._closed:
            self._free.put_nowait(None)  # for whoever waits besides
            raise HandoffRefused(self._closed)
        self._taken.add(index)
        return Slot(index, self._memory[index, :size])

    def hold(self, index: int, size: int) -> Slot:
        """The slot that the peer has filled. Raises HandoffRefused if it cannot have."""
        if self._closed:
            raise HandoffRefused(self._closed)
        if not 0 <= index < len(self._memory) or not 0 < size <= self.slot_bytes:
            raise HandoffRefused("a payload on a link lies in no slot")
        if index in self._taken:
            raise HandoffRefused("a payload on a link lies in a slot that is in use")
        self._taken.add(index)
        return Slot(index, self._memory[index, :size])

    def give_back(self, index: int) -> None:
        """Its payload has been read, or never was written. Raises HandoffRefused if it is free."""
        if index not in self._taken:
            raise HandoffRefused("a slot of a link was freed that was not in use")
        self._taken.remove(index)
        if self._closed:
            self._look()
        else:
            self._free.put_nowait(index)

    def close(self, reason: str) -> None:
        """Nobody gets a slot any more, and those who wait for one hear why."""
        self._closed = reason
        self._free.put_nowait(None)
        self._look()

    def _look(self) -> None:
        if not self._taken:
            unused, self._unused = self._unused, _nothing
            unused()


def _nothing() -> None: ...
