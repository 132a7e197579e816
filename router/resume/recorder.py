"""Records a running request: into the store first, then into the transcript that readers see.

So a client never has a token that another router could not go on from. While the store is out
tokens are not held back: they are kept here and written as soon as it answers again. A store that
has lost the stream takes no more of it: its readers here go on, and no other router can.
"""

from __future__ import annotations

import asyncio
import logging

from cluster.clock import Clock
from cluster.errors import Cancelled, NotFound, PdserveError, Unavailable
from cluster.store.streams import StreamName, Streams
from router.events import Abort
from router.output import Completed
from router.resume import codec
from router.resume.transcript import Transcript
from router.running import Running

STORE_TIMEOUT_SECONDS = 1.0
STORE_RETRY_SECONDS = 0.5

log = logging.getLogger(__name__)


class Recorder:
    """One running request's way into store and transcript.

    Args:
        owner: this router, as the store knows it.
        saved: entries that the store has already.
        keep_seconds: how long a finished stream can be replayed.
    """

    def __init__(
        self,
        streams: Streams,
        name: StreamName,
        owner: str,
        running: Running,
        transcript: Transcript,
        clock: Clock,
        keep_seconds: float,
        saved: int = 0,
    ) -> None:
        self._streams = streams
        self._name = name
        self._owner = owner
        self._running = running
        self._transcript = transcript
        self._clock = clock
        self._keep_seconds = keep_seconds
        self._saved = saved
        self._unsaved: list[str] = []
        self._retry_at = 0.0
        self._lost = False
        self.abandoning = False
        """The router stops: another one is to go on with what does not end in time."""

    async def run(self) -> None:
        """Until the request has ended and the store has its end, or does not answer."""
        end: Completed | PdserveError
        try:
            async for deltas in self._running.deltas():
                self._unsaved += map(codec.entry, deltas)
                if self._clock.now() >= self._retry_at:
                    await self._save()
                self._transcript.extend(deltas)
            end = self._running.completed
        except PdserveError as error:
            self._running.step(Abort(error))
            end = error
        written = await self._finish(end)
        self._transcript.close(end)
        until = self._clock.now() + self._keep_seconds
        while not written and self._clock.now() < until:
            await asyncio.sleep(STORE_RETRY_SECONDS)
            written = await self._finish(end)

    async def _save(self) -> None:
        try:
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                mine = await self._append()
        except (Unavailable, TimeoutError) as error:
            self._retry_at = self._clock.now() + STORE_RETRY_SECONDS
            log.info("stream %s is not recorded now: %s", self._name.id, error)
            return
        if not mine:
            raise Unavailable("another router serves this request now: resume it there")

    async def _finish(self, end: Completed | PdserveError) -> bool:
        """False if the store does not answer."""
        try:
            async with asyncio.timeout(STORE_TIMEOUT_SECONDS):
                if self._unsaved and not await self._append():
                    return True
                if self.abandoning and isinstance(end, Unavailable):
                    await self._streams.abandon(self._name, self._owner)
                else:
                    keep = self._keep_seconds
                    raw = codec.end(end)
                    await self._streams.finish(self._name, self._owner, raw, keep)
        except (Unavailable, TimeoutError) as error:
            log.info("the end of stream %s is not recorded: %s", self._name.id, error)
            return False
        return True

    async def _append(self) -> bool:
        """False if the stream is another router's."""
        mine = True
        try:
            if not self._lost:
                mine = await self._streams.append(
                    self._name, self._owner, self._saved, self._unsaved
                )
        except NotFound as error:
            self._lost = True
            log.warning("stream %s can be resumed on this router only: %s", self._name.id, error)
        if mine:
            self._saved += len(self._unsaved)
            self._unsaved.clear()
        return mine

    def give_up(self) -> None:
        """Nobody wants it any more."""
        self._running.step(Abort(Cancelled("nobody came back for the request")))
