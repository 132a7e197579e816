"""What a worker has for one router: gathered while a message is on its way, sent as one."""

from __future__ import annotations

import asyncio

from cluster.errors import Overloaded
from cluster.worker.sequence import SequenceStep

MAX_STEPS = 65_536
"""A router that lets this many gather has stopped reading."""


class Outbox:
    """Steps in order; one writer takes all that has gathered."""

    def __init__(self) -> None:
        self._steps: list[SequenceStep] = []
        self._filled = asyncio.Event()

    def put(self, step: SequenceStep) -> None:
        """Raises Overloaded when the router has stopped reading."""
        if len(self._steps) >= MAX_STEPS:
            raise Overloaded("the router does not read its stream")
        self._steps.append(step)
        self._filled.set()

    async def take(self) -> list[SequenceStep]:
        """Waits for at least one step."""
        await self._filled.wait()
        self._filled.clear()
        steps, self._steps = self._steps, []
        return steps
