"""How long tokens gather before they are sent: not at all, while the event loop keeps up.

A message costs its two ends about as much for sixteen tokens as for one. So when the loop falls
behind, streams – a router's to its clients, a worker's to its routers – wait a little between
messages, and what arrives meanwhile goes as one: several times the tokens are carried, at the price
of milliseconds that were lost anyway.
"""

from __future__ import annotations

import asyncio

TICK_SECONDS = 0.05
LATE_SECONDS = 0.004
"""The loop falls behind: a timer this late means that callbacks have piled up for as long."""

STEP_SECONDS = 0.004
MAX_SECONDS = 0.06
SLACKEN = 0.85


class Pace:
    """Watches the event loop while somebody asks: an idle process has no timer for it.

    Attributes:
        seconds: that a stream waits after a message before it takes what has come.
        watching: somebody has asked of late.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.watching = self._asked = False

    def ask(self) -> float:
        """`seconds`, for a stream that has something to send."""
        self._asked = True
        if not self.watching:
            self.watching = True
            self._watch()
        return self.seconds

    def see(self, late: float) -> None:
        """A timer came so many seconds late."""
        if late > LATE_SECONDS:
            self.seconds = min(MAX_SECONDS, self.seconds + STEP_SECONDS)
        else:
            self.seconds *= SLACKEN
            if self.seconds < STEP_SECONDS / 4:
                self.seconds = 0.0

    def _watch(self) -> None:
        self._asked = False
        loop = asyncio.get_running_loop()
        due = loop.time() + TICK_SECONDS
        loop.call_at(due, self._ticked, due)

    def _ticked(self, due: float) -> None:
        self.see(asyncio.get_running_loop().time() - due)
        if self._asked or self.seconds:
            self._watch()
        else:
            self.watching = False
