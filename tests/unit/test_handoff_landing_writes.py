"""What a write that was queued on a device keeps, however its wait ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.landing import Landing
from cluster.kv.transport.frames import Blocks


class Inbound:
    """A link's end: its device gets no further, or the link breaks once it has."""

    stream = None

    def __init__(self, breaks: bool) -> None:
        self._breaks = breaks
        self.read: list[bool] = []

    async def reached(self, fence: object) -> None:
        if not self._breaks:
            await asyncio.Event().wait()
        raise HandoffRefused("the link broke")

    def done(self, blocks: Blocks, read: bool = False) -> None:
        self.read.append(read)


@pytest.mark.parametrize("breaks", [False, True], ids=["it is broken off", "its link breaks"])
async def test_a_payload_counts_as_read_only_when_the_device_has_got_there(breaks: bool) -> None:
    """A worker that stops breaks off every wait; a payload's memory may be given up then."""
    inbound = Inbound(breaks)
    reserve = SimpleNamespace(block_ids=(1,))
    reservation = SimpleNamespace(reserve=reserve, writing=0, error="", saw_frame=lambda now: None)
    cache = SimpleNamespace(mark=lambda stream: object(), index=lambda ids, stream: ids)
    rest: Any = [None] * 4
    landing = Landing(inbound, reservation, rest[0], rest[1], cache, rest[2], rest[3])  # type: ignore[arg-type]
    landing._settle(Blocks(BlockRun(0, 0, 1, 0, 1), torch.zeros(8, dtype=torch.uint8)))
    (write,) = landing._writes
    await asyncio.sleep(0.01)
    write.cancel()
    await asyncio.wait([write], timeout=10)
    await asyncio.sleep(0)
    assert inbound.read == [breaks] and reservation.writing == 0
