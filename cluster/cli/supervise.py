"""Runs a command that owns processes: guarded, interruptible at any stage, never leaving one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import NoReturn

from cluster.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, Terminal, flush
from cluster.control.orphans import guard, kill_descendants

SAME_SIGNAL_SECONDS = 0.5
"""A signal to the process group and to the guardian arrives twice and counts once."""


def supervise(terminal: Terminal, work: Callable[[], Awaitable[int]]) -> NoReturn:
    """Exits the process with the code that `work` returns.

    The first SIGINT, SIGTERM or SIGHUP cancels `work`, which stops its cluster in order; the second
    kills every process at once.
    """
    guard()
    try:
        code = asyncio.run(_interruptible(terminal, work))
    except BaseException as error:
        code = terminal.fail(error)
    kill_descendants()
    flush(terminal)
    os._exit(code)


async def _interruptible(terminal: Terminal, work: Callable[[], Awaitable[int]]) -> int:
    task = asyncio.ensure_future(work())
    loop = asyncio.get_running_loop()
    first: float | None = None

    def interrupt() -> None:
        nonlocal first
        if first is None:
            first = loop.time()
            task.cancel()
        elif loop.time() - first > SAME_SIGNAL_SECONDS:
            kill_descendants()
            flush(terminal)
            os._exit(EXIT_INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        return EXIT_INTERRUPTED
    except Exception as error:
        return terminal.fail(error) if first is None else EXIT_FAILED
