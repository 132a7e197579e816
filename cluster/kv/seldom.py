"""Log lines that strangers can cause, kept few."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable


class Seldom:
    """Says a line at most every so many seconds, and then how many were left out.

    Args:
        clock: CLOCK_MONOTONIC seconds.
    """

    def __init__(
        self, log: logging.Logger, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._seconds = seconds
        self._clock = clock
        self._next = 0.0
        self._left_out = 0

    def warning(self, text: str, *args: object) -> None:
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        if self._left_out:
            text, args = f"{text} (and %d more of late)", (*args, self._left_out)
        self._next, self._left_out = now + self._seconds, 0
        self._log.warning(text, *args)
