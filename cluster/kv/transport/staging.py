"""Memory for payloads under way: a fixed number of equal slots, made once, on the device or pinned
for it on the host.

Nothing is allocated while a cluster serves: an allocation can wait for the whole device, and the
device may be waiting for a payload.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.kv.milestones import Fence, Milestones


@dataclass
class Slot:
    """One payload's memory.

    Attributes:
        payload: uint8, the part of the slot that is used.
    """

    index: int
    payload: torch.Tensor


class Staging:
    """Slots of `slot_bytes` each.

    Args:
        size: bytes in all; at least two slots are made.
    """

    def __init__(self, device: torch.device, size: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        count = max(2, size // slot_bytes)
        pinned = device.type == "cpu" and torch.cuda.is_available()
        self._memory = torch.empty(
            count, slot_bytes, dtype=torch.uint8, device=device, pin_memory=pinned
        )
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for index in range(count):
            self._free.put_nowait(index)

    async def take(self, size: int) -> Slot:
        """Waits for a free slot. Raises ValueError for more bytes than a slot has."""
        if size > self.slot_bytes:
            raise ValueError(f"a payload of {size} bytes in slots of {self.slot_bytes}")
        index = await self._free.get()
        return Slot(index, self._memory[index, :size])

    @property
    def slots(self) -> int:
        return len(self._memory)

    def give_back(self, slot: Slot) -> None:
        """No transfer reads or writes it any more."""
        self._free.put_nowait(slot.index)


class Share:
    """One link's or push's slots of a staging memory: never all of them, so that a peer that stands
    still keeps not every other one waiting."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self.slot_bytes = staging.slot_bytes
        self._room = asyncio.Semaphore(max(1, staging.slots * 3 // 4))

    async def take(self, size: int) -> Slot:
        """As `Staging.take`."""
        await self._room.acquire()
        try:
            return await self._staging.take(size)
        except BaseException:
            self._room.release()
            raise

    def give_back(self, slot: Slot) -> None:
        self._staging.give_back(slot)
        self._room.release()


class HostMemory:
    """Where payloads land that cannot go to their places at once."""

    async def take(self, size: int) -> Slot:
        return Slot(0, torch.empty(size, dtype=torch.uint8))

    def give_back(self, slot: Slot, read: bool) -> None:
        """Nothing: it is memory of its own."""


class PinnedMemory:
    """The same for a device, which reads it when its turn comes.

    Args:
        mark: marks the stream of those reads.
    """

    def __init__(
        self, staging: Staging, milestones: Milestones, mark: Callable[[], Fence | None]
    ) -> None:
        self._staging = staging
        self._milestones = milestones
        self._mark = mark

    async def take(self, size: int) -> Slot:
        return await self._staging.take(size)

    def give_back(self, slot: Slot, read: bool) -> None:
        """Once no read of it is queued any more."""
        fence = None if read else self._mark()
        self._milestones.then(fence, lambda _: self._staging.give_back(slot))
