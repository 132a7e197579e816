"""What goes on in a router beside its requests, for as long as it lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

Part = Callable[[], Coroutine[Any, Any, None]]

log = logging.getLogger(__name__)


class Background:
    """Parts that end together: one that dies takes the others with it.

    Args:
        broke: called if they end before they are told to.
    """

    def __init__(self, broke: Callable[[], None]) -> None:
        self._broke = broke
        self._task: asyncio.Task[None] | None = None
        self._parts: dict[str, asyncio.Task[None]] = {}

    @property
    def started(self) -> bool:
        return self._task is not None

    @property
    def runs(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self, parts: Mapping[str, Part]) -> None:
        """Parts by name."""
        self._task = asyncio.create_task(self._run(parts), name="router")
        self._task.add_done_callback(self._ended)

    async def end_part(self, name: str) -> None:
        """Ends one before the others; without it, does nothing."""
        if (part := self._parts.get(name)) is not None and part.cancel():
            await asyncio.wait({part})

    async def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, parts: Mapping[str, Part]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, part in parts.items():
                self._parts[name] = tasks.create_task(part(), name=name)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            log.critical("the router is broken", exc_info=task.exception())
            self._broke()
