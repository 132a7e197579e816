"""Calls that wait for a peer, off the agent's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

from cluster.kv.milestones import settle


def in_a_thread(call: Callable[[], None]) -> asyncio.Future[None]:
    """In one of its own: what waits for a peer must not keep a thread from what ends that wait."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    done.add_done_callback(lambda _: done.cancelled() or done.exception())  # may go unheard

    def run() -> None:
        error: Exception | None = None
        try:
            call()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, done, error)

    threading.Thread(target=run, name="link", daemon=True).start()
    return done
