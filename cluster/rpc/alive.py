"""Whether a silent peer is still there: it is asked, and then dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.rpc.limits import Limits


class Alive:
    """One connection's timer.

    Args:
        ask: sends a ping.
        drop: ends the connection.
    """

    def __init__(self, limits: Limits, ask: Callable[[], None], drop: Callable[[], None]) -> None:
        self._limits = limits
        self._ask, self._drop = ask, drop
        self._loop = asyncio.get_running_loop()
        self.heard = False
        """The peer has said something since this was last set to False."""
        self._timer = self._loop.call_later(limits.keepalive_seconds, self._silent)

    def stop(self) -> None:
        self._timer.cancel()

    def _silent(self) -> None:
        if self.heard:
            self.heard = False
            self._timer = self._loop.call_later(self._limits.keepalive_seconds, self._silent)
        else:
            self._ask()
            wait = self._limits.keepalive_timeout_seconds
            self._timer = self._loop.call_later(wait, self._unanswered)

    def _unanswered(self) -> None:
        if self.heard:
            self._silent()
        else:
            self._drop()
