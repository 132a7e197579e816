"""Waiting for a device without an event loop waiting for it.

A **fence** marks a point in one stream of a device's work. A thread per stream waits for its fences
one after the other and wakes the loop once for all that were reached meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

log = logging.getLogger(__name__)

IDLE_SECONDS = 30.0


class Fence(Protocol):
    """A point in a device's work."""

    def query(self) -> bool:
        """The device has got there. Raises RuntimeError if it failed."""
        ...

    def synchronize(self) -> None:
        """Blocks until the device has got there. Raises RuntimeError if it failed."""
        ...


Reached = Callable[[Exception | None], None]


class Milestones:
    """Fences of one stream, told in the order in which they lie on it.

    Lives on an event loop. Its thread begins with the first fence that has not been reached yet and
    ends when none has come for a while, so where there is no device there is none.
    """

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        self._name = name
        self._device = device
        self._told: queue.SimpleQueue[tuple[Fence, Reached]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = False

    def then(self, fence: Fence | None, reached: Reached) -> None:
        """Calls `reached` on the loop, with the device's failure if it failed; at once if the
        fence has been reached, or if there is none."""
        if fence is None or _passed(fence):
            return reached(None)
        with self._lock:
            self._told.put((fence, reached))
            if not self._waiting:
                self._waiting = True
                loop = asyncio.get_running_loop()
                threading.Thread(
                    target=self._wait, args=(loop,), name=self._name, daemon=True
                ).start()

    async def reached(self, fence: Fence | None) -> None:
        """Waits. Raises what the device failed with."""
        if fence is None or _passed(fence):
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.then(fence, partial(settle, done))
        await done

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        told = self._next()
        while told is not None:
            passed = [(told[1], _failure(told[0]))]
            # What has been reached by then, too, is told together.
            while (told := self._next(wait=False)) is not None and _passed(told[0]):
                passed.append((told[1], None))
            try:
                loop.call_soon_threadsafe(_tell, passed)
            except RuntimeError:
                return  # the loop is closed: nobody waits
            told = told or self._next()

    def _next(self, wait: bool = True) -> tuple[Fence, Reached] | None:
        """None if there is none; after waiting in vain the thread is over."""
        try:
            return self._told.get(wait, IDLE_SECONDS)
        except queue.Empty:
            if not wait:
                return None
        with self._lock:
            self._waiting = not self._told.empty()
            return self._told.get() if self._waiting else None


def settle(done: asyncio.Future[None], error: Exception | None) -> None:
    """It is done, or has failed; unless nobody waits for it any more."""
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _passed(fence: Fence) -> bool:
    try:
        return fence.query()
    except RuntimeError:
        return False  # whoever waits for it hears why


def _failure(fence: Fence) -> Exception | None:
    try:
        fence.synchronize()
    except RuntimeError as error:
        return error
    return None


def _tell(passed: list[tuple[Reached, Exception | None]]) -> None:
    for reached, error in passed:
        try:
            reached(error)
        except Exception:  # the others are told all the same
            log.exception("what a device had done was not taken in")
