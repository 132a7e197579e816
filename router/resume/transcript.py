"""All that was sent of a request, for as many readers as come, at any offset."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence

from cluster.errors import DeadlineExceeded, InvalidRequest, Overloaded, PdserveError
from cluster.ids import RequestId
from router.generation import Generation
from router.output import Completed, Delta

SLOW_READER_SECONDS = 60.0
"""A reader that takes nothing for so long is cut off; what it has not taken stays where it is."""


class Transcript:
    """Deltas in order, then the end. Memory is the request's own: readers hold a position only.

    Args:
        left: called when the last reader has left.
    """

    def __init__(self, generation: Generation, left: Callable[[], None]) -> None:
        self.generation = generation
        self.deltas: list[Delta] = []
        self.end: Completed | PdserveError | None = None
        self.readers = 0
        self._left = left
        self._news = asyncio.Event()

    @property
    def counts(self) -> list[int]:
        """Tokens of each completion."""
        counts = [0] * self.generation.sampling.n
        for delta in self.deltas:
            counts[delta.index] = delta.offset + len(delta.token_ids)
        return counts

    def extend(self, deltas: Sequence[Delta]) -> None:
        self.deltas += deltas
        self._wake()

    def close(self, end: Completed | PdserveError) -> None:
        """Nothing follows."""
        self.end = end
        self._wake()

    async def news(self) -> None:
        """Until there is more than there was."""
        await self._news.wait()

    def reader(self, next_offsets: Sequence[int] = (), until: float = math.inf) -> Reader:
        """From these offsets on, one for each completion; 0 where there is none.

        Args:
            until: the reader's own deadline, on the event loop's clock.

        Raises:
            InvalidRequest: there are more than completions.
        """
        n = self.generation.sampling.n
        self.readers += 1
        if len(next_offsets) > n:
            self.leave()  # whoever began to follow the stream for it need not go on
            raise InvalidRequest("next_offset", f"has {len(next_offsets)} entries, of {n} at most")
        padding = [0] * (n - len(next_offsets))
        return Reader(self, [*next_offsets, *padding], until)

    def leave(self) -> None:
        self.readers -= 1
        if not self.readers:
            self._left()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Reader:
    """One consumer of a transcript; an `Answer`."""

    def __init__(
        self, transcript: Transcript, next_offsets: list[int], until: float = math.inf
    ) -> None:
        self._transcript = transcript
        self._next = next_offsets
        self._until = until
        self._error: PdserveError | None = None
        self._gone = False
        self.on_cut: Callable[[], None] | None = None
        self.direct: Callable[[Delta], bool] | None = None  # Readers take several at a time.

    @property
    def request_id(self) -> RequestId:
        return self._transcript.generation.request_id

    @property
    def model(self) -> str:
        return self._transcript.generation.model

    @property
    def n(self) -> int:
        return self._transcript.generation.sampling.n

    @property
    def error(self) -> PdserveError | None:
        return self._error

    @property
    def completed(self) -> Completed:
        assert isinstance(self._transcript.end, Completed)
        return self._transcript.end

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """From the asked offsets on.

        Raises:
            InvalidRequest: an offset is behind the end.
            DeadlineExceeded: nothing came until this reader's own deadline.
            PdserveError: the request failed, or this reader is too slow.
        """
        position = 0
        loop = asyncio.get_running_loop()
        while True:
            batch = self._transcript.deltas[position:]
            position += len(batch)
            rest = [rest for delta in batch if (rest := self._rest(delta)) is not None]
            if rest:
                cut_at = min(self._until, loop.time() + SLOW_READER_SECONDS)
                timer = loop.call_at(cut_at, self._cut)
                try:
                    yield rest
                finally:
                    timer.cancel()
            elif self._transcript.end is not None and not batch:
                self._check_end(self._transcript.end)
                return
            elif not batch:
                await self._news()

    def leave(self) -> None:
        """The consumer's call is over; the request goes on for a while."""
        if not self._gone:
            self._gone = True
            self._transcript.leave()

    def _rest(self, delta: Delta) -> Delta | None:
        """What of `delta` the reader has not got.

        Its text comes whole or not at all: `text_offset` says where it begins.
        """
        known = self._next[delta.index] - delta.offset
        if known <= 0:
            return delta
        if known < len(delta.token_ids):
            return delta._replace(
                offset=self._next[delta.index],
                token_ids=delta.token_ids[known:],
                logprobs=delta.logprobs[known:],
            )
        if delta.finish is None:
            return None
        offset = delta.offset + len(delta.token_ids)
        return delta._replace(offset=offset, token_ids=(), logprobs=())

    def _check_end(self, end: Completed | PdserveError) -> None:
        for index, (due, count) in enumerate(zip(self._next, self._transcript.counts, strict=True)):
            if due > count:
                raise InvalidRequest(
                    "next_offset",
                    f"{due} is past the end: completion {index} has {count} tokens",
                )
        if isinstance(end, PdserveError):
            raise end

    async def _news(self) -> None:
        try:
            async with asyncio.timeout_at(self._until if math.isfinite(self._until) else None):
                await self._transcript.news()
        except TimeoutError:
            raise _late() from None

    def _cut(self) -> None:
        late = asyncio.get_running_loop().time() >= self._until
        slow = "the client reads too slowly; resume where it stopped"
        self._error = _late() if late else Overloaded(slow, 1.0)
        if self.on_cut is not None:
            self.on_cut()


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed; the request goes on: repeat or resume it")
