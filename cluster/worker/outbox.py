"""What a worker has for one router: gathered while a message is on its way, or the event loop late,
and sent as one."""

from __future__ import annotations

import asyncio
import contextlib

from cluster.errors import Overloaded
from cluster.pace import Pace
from cluster.worker.blocks import BlockChanges
from cluster.worker.sequence import SequenceStep, joined

MAX_STEPS = 65_536
"""A router that lets this many gather has stopped reading."""

MAX_CHANGES = 1024


class Outbox:
    """Steps in each sequence's order, block changes in theirs; one writer takes what is there.

    Args:
        pace: how long to let steps gather; first tokens and failures wait for none.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._urgent = asyncio.Event()
        self._steps: dict[str, list[SequenceStep]] = {}
        self._count = 0
        self._blocks: list[BlockChanges] = []
        self._filled = asyncio.Event()

    def put(self, step: SequenceStep) -> None:
        """Raises Overloaded when the router has stopped reading; a sequence's last step, of which
        there is one, is always taken: it must not be waited for in vain."""
        if self._count >= MAX_STEPS and step.finish_reason is None:
            raise Overloaded("the router does not read its stream")
        self._steps.setdefault(step.sequence_id, []).append(step)
        self._count += 1
        self._filled.set()
        if step.offset == 0:
            self._urgent.set()

    def put_blocks(self, changes: BlockChanges) -> None:
        """Raises Overloaded when the router has stopped reading."""
        if len(self._blocks) >= MAX_CHANGES:
            raise Overloaded("the router does not read its stream")
        self._blocks.append(changes)
        self._filled.set()

    async def take(self) -> tuple[list[SequenceStep], BlockChanges | None]:
        """Waits for something: all steps, those of a sequence as one, and the next changes."""
        await self._filled.wait()
        if seconds := self._pace.ask():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._urgent.wait()
        self._urgent.clear()
        gathered, self._steps, self._count = self._steps, {}, 0
        steps = [step for waiting in gathered.values() for step in _merged(waiting)]
        blocks = self._blocks.pop(0) if self._blocks else None
        if not self._blocks:
            self._filled.clear()
        return steps, blocks


def _merged(steps: list[SequenceStep]) -> list[SequenceStep]:
    """As one, but for a failure, which says nothing of the tokens before it."""
    if len(steps) == 1:
        return steps
    if steps[-1].error is not None:
        return [*_merged(steps[:-1]), steps[-1]]
    return [joined(steps)]
