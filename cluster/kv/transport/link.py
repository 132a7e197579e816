"""A link: one NCCL communicator between a prefill rank and a decode rank.

Payloads cross in the order of their headers, which travel on one gRPC stream. A link that breaks,
stands still for too long, or whose stream ends, is aborted as a whole, on the device too; what was
under way on it is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any

import torch

from cluster.errors import HandoffRefused
from cluster.kv.transport.nccl_library import Communicator
from cluster.kv.transport.staging import Slot

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
_FIRST_LOOK, _LAST_LOOK = 50e-6, 1e-3


class Link:
    """One end. Lives on the agent's event loop.

    Args:
        rank: 0 sends, 1 receives.
        stuck_seconds: a transfer that takes longer has a dead peer.

    Attributes:
        broken: why it is down; empty while it is up.
        used_at: CLOCK_MONOTONIC seconds.
    """

    def __init__(
        self,
        unique_id: bytes,
        rank: int,
        device: torch.device,
        stuck_seconds: float,
        max_ctas: int | None,
    ) -> None:
        self._device = device
        self._stuck_seconds = stuck_seconds
        self.broken = ""
        self.used_at = time.monotonic()
        self.stream = torch.cuda.Stream(device)
        self._under_way: deque[tuple[float, Any]] = deque()
        self._aborting: asyncio.Future[None] | None = None
        self._comm = Communicator(unique_id, rank, max_ctas)
        self._watcher = asyncio.create_task(self._watch())

    async def up(self) -> None:
        """Waits for the peer to join. Raises HandoffRefused if it does not."""
        try:
            async with asyncio.timeout(self._stuck_seconds):
                await self._settle()
        except TimeoutError:
            self.abort("the peer did not join the link")
            raise HandoffRefused(self.broken) from None

    async def send(self, slot: Slot) -> Any:
        """Queues a payload; returns the event behind it."""
        return await self._queue(self._comm.send, slot)

    async def receive(self, slot: Slot) -> Any:
        """Queues the next payload's arrival; returns the event behind it."""
        return await self._queue(self._comm.receive, slot)

    async def _queue(self, transfer: Any, slot: Slot) -> Any:
        self._raise_if_broken()
        transfer(slot.payload.data_ptr(), slot.payload.numel(), self.stream.cuda_stream)
        await self._settle()
        event = torch.cuda.Event()
        event.record(self.stream)
        self.used_at = time.monotonic()
        self._under_way.append((self.used_at, event))
        return event

    async def reached(self, event: Any) -> None:
        """Waits for a transfer's end. Raises HandoffRefused if the link broke before."""
        pause = _FIRST_LOOK
        while not event.query():
            self._raise_if_broken()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_LOOK)
        self._raise_if_broken()

    async def _settle(self) -> None:
        looks = 0
        while not self._comm.settled():
            looks += 1
            await asyncio.sleep(0 if looks < 100 else _LAST_LOOK)
            self._raise_if_broken()

    async def _watch(self) -> None:
        while not self.broken:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                while self._under_way and self._under_way[0][1].query():
                    self._under_way.popleft()
                late = time.monotonic() - self._stuck_seconds
                if self._under_way and self._under_way[0][0] < late:
                    self.abort("a transfer over the link stood still")
                elif not self.broken:
                    self._comm.settled()
            except Exception as error:
                self.abort(str(error))

    def _raise_if_broken(self) -> None:
        if self.broken:
            raise HandoffRefused(self.broken)

    def abort(self, reason: str) -> None:
        """Takes the link down; harmless if it is down."""
        if self.broken:
            return
        self.broken = reason or "the link was closed"
        log.info("link aborted: %s", self.broken)
        self._watcher.cancel()
        self._aborting = asyncio.get_running_loop().run_in_executor(None, self._abort)

    async def over(self, event: Any) -> None:
        """Waits until a transfer touches its memory no more, however it ends; None: it may not have
        begun, and the link is being aborted."""
        try:
            if event is not None:
                return await self.reached(event)
        except HandoffRefused:
            pass
        if self._aborting is not None:
            await asyncio.shield(self._aborting)

    def _abort(self) -> None:
        with torch.cuda.device(self._device):
            self._comm.abort()
