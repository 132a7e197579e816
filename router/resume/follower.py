"""Follows a stream that another router writes, by reading the store again and again."""

from __future__ import annotations

import asyncio
import logging

from cluster.errors import NotResumable, PdserveError, Unavailable
from cluster.store.streams import StreamName, Streams
from router.resume import codec
from router.resume.transcript import Transcript

POLL_SECONDS = 0.05
CHECK_OWNER_POLLS = 10

log = logging.getLogger(__name__)


async def follow(streams: Streams, name: StreamName, transcript: Transcript, owner: str) -> bool:
    """Fills the transcript until the stream ends.

    Returns:
        True if the router that wrote it is gone, and `owner` owns the stream now: it is to go on.
    """
    polls = 0
    while True:
        try:
            # The end is written after the last entry: read in the other order none is missed.
            head = await streams.head(name)
            entries = await streams.entries(name, len(transcript.deltas))
            if entries:
                transcript.extend([codec.delta(entry) for entry in entries])
            if head is None:
                transcript.close(_gone(name, transcript))
                return False
            if head.end:
                transcript.close(codec.ended(head.end))
                return False
            gone = polls % CHECK_OWNER_POLLS == 0 and await streams.take_over(name, head, owner)
            if gone:
                last = await streams.entries(name, len(transcript.deltas))
                transcript.extend([codec.delta(entry) for entry in last])
                return True
        except Unavailable as error:
            log.info("stream %s cannot be followed now: %s", name.id, error)
        polls += 1
        await asyncio.sleep(POLL_SECONDS)


def _gone(name: StreamName, transcript: Transcript) -> PdserveError:
    if transcript.deltas:
        return NotResumable(f"request {name.request_id} has expired")
    return Unavailable(f"request {name.request_id} was given up before it began: ask again")
