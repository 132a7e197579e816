"""The output buffer between a request and its client: bounded, and merged while the client lags."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cluster.errors import PdserveError
from cluster.pace import Pace
from router.output import Completed, Delta, joined

BUFFER_TOKENS = 4096
"""Tokens that may wait for a client before its request is cut off."""

MERGED_TOKENS = 256
"""Tokens of one completion that go out in one message at most, when they have waited."""


class OutputBuffer:
    """Deltas that the client has not taken yet, then the end.

    One task takes; the event loop's callbacks put. Deltas of one completion that wait next to each
    other become one, so that a lagging client costs fewer messages.

    Args:
        pace: how long to let deltas gather after the first, if they come that quickly; None: never.
    """

    def __init__(self, limit_tokens: int = BUFFER_TOKENS, pace: Pace | None = None) -> None:
        self._pace = pace
        self._put_at = 0.0
        self._gap = 0.0
        self._taken = False
        self._limit = limit_tokens
        self._runs: list[list[Delta]] = []
        self._run_tokens = 0
        self._tokens = 0
        self._end: Completed | PdserveError | None = None
        self._wake = asyncio.Event()
        self.on_cut: Callable[[], None] | None = None
        """Called when the request is cut off while its client may be blocked in a write."""

        self.direct: Callable[[Delta], bool] | None = None
        """As `Answer.direct`: called while the taker waits, nothing else does, and the event loop
        keeps up."""
        self._idle = False

    def put(self, delta: Delta) -> bool:
        """False if more tokens wait than may: the request is to be cut off."""
        now = time.monotonic()
        self._gap = now - (self._put_at or now)
        self._put_at = now
        direct = self.direct
        if (
            direct is not None
            and self._idle
            and not self._runs
            and (self._pace is None or self._pace.ask() <= self._gap)
            and direct(delta)
        ):
            self._taken = True
            return True
        same = self._runs and self._runs[-1][-1].index == delta.index
        if same and self._run_tokens < MERGED_TOKENS:
            self._runs[-1].append(delta)
        else:
            self._runs.append([delta])
            self._run_tokens = 0
        self._run_tokens += len(delta.token_ids)
        self._tokens += len(delta.token_ids)
        self._wake.set()
        return self._tokens <= self._limit

    def close(self, end: Completed | PdserveError) -> None:
        """Nothing follows. After an error what waits is still delivered, unless it is cut off."""
        self._end = end
        self._wake.set()

    def cut(self) -> None:
        """Drops what waits and interrupts the client's write."""
        self._runs, self._tokens = [], 0
        if self.on_cut is not None:
            self.on_cut()

    async def take(self) -> list[Delta]:
        """All that waits, at least one delta; empty at the end of a request that succeeded.

        Raises:
            PdserveError: the request has failed.
        """
        # Only where waiting brings a delta that can go with the one that is there.
        wait = self._pace.ask() if self._pace is not None else 0.0
        if wait > self._gap and self._taken and self._end is None:
            await asyncio.sleep(wait)
        while not self._runs and self._end is None:
            self._wake.clear()
            self._idle = True
            try:
                await self._wake.wait()
            finally:
                self._idle = False
        runs, self._runs, self._tokens = self._runs, [], 0
        self._taken = True
        if not runs and isinstance(self._end, PdserveError):
            raise self._end
        return [joined(run) if len(run) > 1 else run[0] for run in runs]

    @property
    def error(self) -> PdserveError | None:
        """What the request failed with, once it has."""
        return self._end if isinstance(self._end, PdserveError) else None

    @property
    def completed(self) -> Completed:
        """After the end of a request that succeeded."""
        assert isinstance(self._end, Completed)
        return self._end
