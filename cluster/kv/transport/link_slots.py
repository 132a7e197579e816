"""A link's memory at one end: equal slots, as many at either end.

A payload lies in consecutive slots, the same on both sides, so that whoever fills them knows where
it will land; the first one names them. The sender takes slots, the receiver gives them back: they
are free once their payload has been read where it landed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import torch

from cluster.errors import HandoffRefused
from cluster.kv.transport.staging import Slot

MAX_SLOTS = 1024
"""Of one link."""
LARGEST_BYTES = 128 << 20
"""Of a payload: large ones take less of the engines' Python, and while one crosses others are
copied at either end."""
ALIGNMENT = 64
"""Of slots: devices read and write payloads by the word."""


class LinkSlots:
    """Lives on the agent's event loop. Whoever waits is served in turn.

    Args:
        memory: uint8, `[slots, bytes of a slot]`.
        unused: called once when the link is closed and every slot is free: nothing touches the
            memory any more.
    """

    def __init__(self, memory: torch.Tensor, unused: Callable[[], None]) -> None:
        self._bytes = memory.view(-1)
        self._slot_bytes = int(memory.shape[1])
        self._used = bytearray(len(memory))
        self._unused = unused
        self._taken: dict[int, int] = {}
        self._waiting: deque[tuple[int, asyncio.Future[Slot]]] = deque()
        self._closed = ""

    @property
    def free(self) -> int:
        """How many are free."""
        return self._used.count(0)

    @property
    def largest(self) -> int:
        """Bytes of the largest payload; there is room for another one as large."""
        return largest_payload(len(self._used), self._slot_bytes)

    async def take(self, size: int) -> Slot:
        """Waits for free slots. Raises HandoffRefused if the link is closed."""
        if size > len(self._bytes):
            raise ValueError(f"a payload of {size} bytes in {len(self._bytes)}")
        self._raise_if_closed()
        if not self._waiting and (slot := self._find(size)):
            return slot
        given: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, given))
        try:
            return await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled() and not given.exception():
                self.give_back(given.result().index)
            self._serve()  # it may have stood before others
            raise

    def hold(self, index: int, size: int) -> Slot:
        """The slots that the peer has filled. Raises HandoffRefused if it cannot have."""
        self._raise_if_closed()
        count = self._count(size)
        if index < 0 or size <= 0 or index + count > len(self._used):
            raise HandoffRefused("a payload on a link lies in no slot")
        if any(self._used[index : index + count]):
            raise HandoffRefused("a payload on a link lies in a slot that is in use")
        return self._mark(index, size)

    def give_back(self, index: int) -> None:
        """Their payload has been read, or never was written. Raises HandoffRefused if no payload
        begins there."""
        count = self._taken.pop(index, 0)
        if not count:
            raise HandoffRefused("a slot of a link was freed that was not in use")
        self._used[index : index + count] = bytes(count)
        if self._closed:
            self._look()
        else:
            self._serve()

    def close(self, reason: str) -> None:
        """Nobody gets a slot any more, and those who wait for one hear why."""
        self._closed = reason
        for _, given in self._waiting:
            if not given.done():
                given.set_exception(HandoffRefused(reason))
        self._waiting.clear()
        self._look()

    def _serve(self) -> None:
        while self._waiting:
            size, given = self._waiting[0]
            if not given.done():
                slot = self._find(size)
                if slot is None:
                    return
                given.set_result(slot)
            self._waiting.popleft()

    def _find(self, size: int) -> Slot | None:
        index = self._used.find(bytes(self._count(size)))
        return None if index < 0 else self._mark(index, size)

    def _mark(self, index: int, size: int) -> Slot:
        count = self._taken[index] = self._count(size)
        self._used[index : index + count] = b"\1" * count
        start = index * self._slot_bytes
        return Slot(index, self._bytes[start : start + size])

    def _count(self, size: int) -> int:
        return -(-size // self._slot_bytes)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise HandoffRefused(self._closed)

    def _look(self) -> None:
        if not self._taken:
            unused, self._unused = self._unused, _nothing
            unused()


def largest_payload(slots: int, slot_bytes: int) -> int:
    """Of a link of so many slots, bytes."""
    return max(1, min(slots // 2, LARGEST_BYTES // slot_bytes)) * slot_bytes


def _nothing() -> None: ...
