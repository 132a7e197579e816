"""Whether requests can be served now, and the waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cluster.errors import Unavailable


class Readiness:
    """Asks again whenever it is told of a change.

    Args:
        why_not: why requests cannot be served now; empty if they can.
    """

    def __init__(self, why_not: Callable[[], str]) -> None:
        self._why_not = why_not
        self._changed = asyncio.Event()

    def change(self) -> None:
        """Ends the waits for a change; who waits next waits for the next one."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, timeout: float) -> None:
        """Raises Unavailable, which says why, if they cannot be served within `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self._why_not():
                    await self._changed.wait()
        except TimeoutError:
            raise Unavailable(self._why_not()) from None

    async def report(self, serving: Callable[[bool], Awaitable[None]]) -> None:
        """Says it now and after every change, until it is cancelled."""
        while True:
            changed = self._changed
            await serving(not self._why_not())
            await changed.wait()
