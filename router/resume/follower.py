"""Follows a stream that another router writes, by reading the store again and again."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from cluster.errors import NotResumable, PdserveError, Unavailable
from cluster.store.streams import StreamName, Streams
from router.output import Completed
from router.resume import codec
from router.resume.transcript import Transcript

POLL_SECONDS = 0.05
CHECK_OWNER_POLLS = 10

log = logging.getLogger(__name__)


async def follow(
    streams: Streams,
    name: StreamName,
    transcript: Transcript,
    owner: str,
    hold: Callable[[], None],
    let_go: Callable[[], None],
) -> bool:
    """Fills the transcript until the stream ends, or nobody reads it.

    Args:
        hold, let_go: called around what must not be broken off, because the stream may have become
            this router's; it is held when this returns True.

    Returns:
        True if the router that wrote it is gone, and `owner` owns the stream now: it is to go on.
    """
    polls, mark = 0, secrets.token_hex(8)
    while True:
        try:
            # The end is written after the last entry: read in the other order none is missed.
            head = await streams.head(name)
            await _read(streams, name, transcript)
            if head is None:
                transcript.close(_gone(name, transcript))
                return False
            if head.end:
                transcript.close(_end(name, transcript, head.end))
                return False
            if polls % CHECK_OWNER_POLLS == 0:
                hold()
                if await streams.take_over(name, head, owner, mark):
                    await _read_at_last(streams, name, transcript)
                    return True
                let_go()
                if not transcript.readers:
                    return False
        except Unavailable as error:
            log.info("stream %s cannot be followed now: %s", name.id, error)
        polls += 1
        await asyncio.sleep(POLL_SECONDS)


async def _read(streams: Streams, name: StreamName, transcript: Transcript) -> None:
    if entries := await streams.entries(name, len(transcript.deltas)):
        transcript.extend([codec.delta(entry) for entry in entries])


async def _read_at_last(streams: Streams, name: StreamName, transcript: Transcript) -> None:
    """The stream is this router's: nobody else would go on with it if this gave up."""
    while True:
        try:
            return await _read(streams, name, transcript)
        except Unavailable as error:
            log.info("stream %s cannot be gone on with yet: %s", name.id, error)
            await asyncio.sleep(POLL_SECONDS)


def _end(name: StreamName, transcript: Transcript, raw: str) -> Completed | PdserveError:
    """How it ended; an error where its tokens are not all there: a store that evicts, or expired
    them between two readings."""
    end = codec.ended(raw)
    if isinstance(end, Completed) and end.completion_tokens != sum(transcript.counts):
        return NotResumable(f"request {name.request_id} has expired, or the store has lost of it")
    return end


def _gone(name: StreamName, transcript: Transcript) -> PdserveError:
    if transcript.deltas:
        return NotResumable(f"request {name.request_id} has expired")
    return Unavailable(f"request {name.request_id} was given up before it began: ask again")
