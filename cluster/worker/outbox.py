"""What a worker has for one router: gathered while a message is on its way, sent as one."""

from __future__ import annotations

import asyncio

from cluster.errors import Overloaded
from cluster.worker.blocks import BlockChanges
from cluster.worker.sequence import SequenceStep

MAX_STEPS = 65_536
"""A router that lets this many gather has stopped reading."""

MAX_CHANGES = 1024


class Outbox:
    """Steps in order, block changes in order; one writer takes what has gathered."""

    def __init__(self) -> None:
        self._steps: list[SequenceStep] = []
        self._blocks: list[BlockChanges] = []
        self._filled = asyncio.Event()

    def put(self, step: SequenceStep) -> None:
        """Raises Overloaded when the router has stopped reading."""
        if len(self._steps) >= MAX_STEPS:
            raise Overloaded("the router does not read its stream")
        self._steps.append(step)
        self._filled.set()

    def put_blocks(self, changes: BlockChanges) -> None:
        """Raises Overloaded when the router has stopped reading."""
        if len(self._blocks) >= MAX_CHANGES:
            raise Overloaded("the router does not read its stream")
        self._blocks.append(changes)
        self._filled.set()

    async def take(self) -> tuple[list[SequenceStep], BlockChanges | None]:
        """Waits for something: all steps that there are, and the next of the block changes."""
        await self._filled.wait()
        steps, self._steps = self._steps, []
        blocks = self._blocks.pop(0) if self._blocks else None
        if not self._blocks:
            self._filled.clear()
        return steps, blocks
