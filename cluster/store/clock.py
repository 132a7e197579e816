"""How far this host's wall clock is from the store's: the one clock that all hosts can see."""

from __future__ import annotations

import time
from typing import Any

from redis.asyncio import Redis

from cluster.store.client import store_errors


async def ahead_seconds(client: Redis) -> float:
    """By how much this host's clock is certainly ahead (behind: negative); 0 within the error of
    the round trip. Raises Unavailable while the store is out."""
    any_client: Any = client
    with store_errors():
        before = time.time()
        seconds, micros = await any_client.time()
        after = time.time()
    return certain_offset(before, after, seconds + micros / 1e6)


def certain_offset(before: float, after: float, theirs: float) -> float:
    """Of a clock that read `before` and `after` around a reading of another one."""
    if theirs < before:
        return before - theirs
    return after - theirs if theirs > after else 0.0
