"""Links between agents of one process on CPUs: all of NCCL's transport but NCCL.

Whoever joins a link under the same name gets the other end. A put copies into the other end's
memory at once; by kernels, what was sent waits for the receiver to ask for it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from typing import ClassVar

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.milestones import Fence, Milestones
from cluster.kv.transport import choose, inbound_links, nccl
from cluster.kv.transport.link import Link, LinkTerms
from cluster.kv.transport.link_slots import LinkSlots
from cluster.kv.transport.nccl_library import UNIQUE_ID_BYTES
from cluster.kv.transport.staging import Slot

PAUSE = 0.001


class Passed:
    """A fence that was reached as it was made."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class MemoryLink(Link):
    """One end, on its agent's loop."""

    puts = True
    copies = None
    ends: ClassVar[dict[tuple[bytes, int], MemoryLink]] = {}

    def __init__(
        self, unique_id: bytes, rank: int, terms: LinkTerms, slots: int, slot_bytes: int
    ) -> None:
        self._name, self._rank = unique_id, rank
        self.device = terms.device
        self.stuck_seconds = terms.stuck_seconds
        self.broken = ""
        self.used_at = time.monotonic()
        self.memory = torch.empty(slots, slot_bytes, dtype=torch.uint8)
        self._milestones = Milestones("link")
        self._slots = LinkSlots(self.memory, lambda: None)
        self._sent: deque[torch.Tensor] = deque()
        self._when_down = []
        self._aborting = None
        self.ends[unique_id, rank] = self

    @property
    def _other(self) -> MemoryLink:
        return self.ends[self._name, 1 - self._rank]

    async def up(self) -> None:
        try:
            async with asyncio.timeout(self.stuck_seconds):
                while True:
                    if (self._name, 1 - self._rank) in self.ends:
                        return
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            raise HandoffRefused("the peer did not join the link") from None

    def put(self, slot: Slot, filled: Fence | None) -> Fence:
        self._raise_if_broken()
        self.used_at = time.monotonic()
        start = slot.index * self.memory.shape[1]
        self._other.memory.view(-1)[start : start + slot.payload.numel()] = slot.payload
        return Passed()

    async def send(self, slot: Slot, filled: Fence | None) -> Fence:
        self._raise_if_broken()
        self.used_at = time.monotonic()
        self._sent.append(slot.payload.clone())
        return Passed()

    async def receive(self, slot: Slot) -> None:
        while not self.puts and not self._other._sent:
            self._raise_if_broken()
            await asyncio.sleep(PAUSE)
        self._raise_if_broken()
        if not self.puts:
            slot.payload.copy_(self._other._sent.popleft())

    def mark(self) -> Fence:
        return Passed()

    def abort(self, reason: str) -> None:
        if self.broken:
            return
        self.broken = reason
        self._aborting = asyncio.get_running_loop().create_future()
        self._aborting.set_result(None)
        self.slots.close(reason)
        for call in self._when_down:
            call()


def install(patch: pytest.MonkeyPatch, puts: bool) -> None:
    """Agents that are started from now on reach each other so, if they are to use NCCL."""
    patch.setattr(MemoryLink, "puts", puts)
    patch.setattr(MemoryLink, "ends", {})
    patch.setattr(choose, "nccl_available", lambda cache: "")
    patch.setattr(nccl, "new_unique_id", lambda: secrets.token_bytes(UNIQUE_ID_BYTES))
    patch.setattr(nccl, "Link", MemoryLink)
    patch.setattr(inbound_links, "Link", MemoryLink)
