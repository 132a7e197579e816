"""A link: one NCCL communicator between a prefill rank and a decode rank.

Payloads cross in the order of their headers, which travel on one gRPC stream. Everything is queued
on the device and nothing on the host waits for it: copies on one stream, transfers on another, each
held by an event until the other has done its part. A link that breaks, stands still for too long,
or whose stream ends, is aborted as a whole, on the device too; what was under way on it is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from cluster.errors import HandoffRefused
from cluster.kv.milestones import Fence, Milestones
from cluster.kv.transport.checksums import PART_BYTES, DeviceSum
from cluster.kv.transport.nccl_library import Communicator
from cluster.kv.transport.staging import Slot

log = logging.getLogger(__name__)


class _Streams:
    """Streams of links, used again: torch has 32 of a priority and deals them out in turn. The
    engine's are of another priority, so a link never waits in one of those."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def take(self, device: torch.device) -> Any:
        for stream in self._free:
            if stream.device == device:
                self._free.remove(stream)
                return stream
        return torch.cuda.Stream(device, priority=-1)

    def give_back(self, *streams: Any) -> None:
        self._free.extend(streams)


_streams = _Streams()

WATCH_SECONDS = 0.25
_PAUSE = 1e-3


class Link:
    """One end. Lives on the agent's event loop.

    Args:
        rank: 0 sends, 1 receives.
        stuck_seconds: a transfer that takes longer has a dead peer.

    Attributes:
        broken: why it is down; empty while it is up.
        used_at: CLOCK_MONOTONIC seconds.
        copies: the stream on which slots are filled, or read.
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
        self._rank = rank
        self._stuck_seconds = stuck_seconds
        self.broken = ""
        self.used_at = time.monotonic()
        self.copies, self._wire = _streams.take(device), _streams.take(device)
        self._milestones = Milestones("link", device)
        self._under_way: deque[tuple[float, Any]] = deque()
        self._aborting: asyncio.Future[None] | None = None
        self._warm_up()
        self._comm = Communicator(unique_id, rank, max_ctas)
        self._watcher = asyncio.create_task(self._watch())

    async def up(self) -> None:
        """Waits for the peer to join. Raises HandoffRefused if it does not."""
        try:
            async with asyncio.timeout(self._stuck_seconds):
                await self._settle()
                self._comm.split()
                await self._settle()
                # The first transfer waits for the peer on the host, the others on the device only.
                await asyncio.shield(_in_a_thread(self._first_transfer))
        except TimeoutError:
            self.abort("the peer did not join the link")
            raise HandoffRefused(self.broken) from None

    def _first_transfer(self) -> None:
        with torch.cuda.device(self._device):
            payload = torch.zeros(8, dtype=torch.uint8, device=self._device)
            torch.cuda.current_stream().synchronize()
            transfer = self._comm.send if self._rank == 0 else self._comm.receive
            transfer(payload.data_ptr(), payload.numel(), self._wire.cuda_stream)
            self._wire.synchronize()

    def _warm_up(self) -> None:
        """Has memory for what is queued on `copies` allocated now: an allocation can wait for the
        whole device, and the device may be waiting for a payload."""
        with torch.cuda.stream(self.copies):
            part = torch.zeros(PART_BYTES, dtype=torch.uint8, device=self._device)
        DeviceSum(self._device, self.copies, 0).add(part)

    async def send(self, slot: Slot, filled: Fence | None) -> Fence:
        """Queues a payload behind `filled`; returns the fence behind the transfer."""
        self._raise_if_broken()
        if filled is not None:
            self._wire.wait_event(filled)
        fence: Fence = await self._queue(self._comm.send, slot)
        return fence

    async def receive(self, slot: Slot) -> None:
        """Queues the next payload's arrival; `copies` goes on once it is there."""
        self._raise_if_broken()
        self.copies.wait_event(await self._queue(self._comm.receive, slot))

    async def _queue(self, transfer: Any, slot: Slot) -> Any:
        transfer(slot.payload.data_ptr(), slot.payload.numel(), self._wire.cuda_stream)
        await self._settle()
        fence = torch.cuda.Event(blocking=True)
        fence.record(self._wire)
        self.used_at = time.monotonic()
        self._under_way.append((self.used_at, fence))
        return fence

    def mark(self) -> Fence:
        """A fence behind everything queued on `copies` so far."""
        fence: Fence = torch.cuda.Event(blocking=True)
        self.copies.record_event(fence)
        return fence

    async def reached(self, fence: Fence | None) -> None:
        """Waits for a fence. Raises HandoffRefused if the link is broken by then."""
        await self._milestones.reached(fence)
        self._raise_if_broken()

    def release(self, fence: Fence | None, free: Callable[[], None]) -> None:
        """Calls `free` once no transfer or copy up to `fence` touches its memory any more, however
        it ends; None: it may not have begun, and the link is being aborted."""
        if fence is not None:
            self._milestones.then(fence, lambda _: free())
        elif self._aborting is not None:
            self._aborting.add_done_callback(lambda _: free())
        else:
            free()

    async def _settle(self) -> None:
        looks = 0
        while not self._comm.settled():
            looks += 1
            await asyncio.sleep(0 if looks < 100 else _PAUSE)
            self._raise_if_broken()

    async def _watch(self) -> None:
        moved = 0.0
        while not self.broken:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                while self._under_way and self._under_way[0][1].query():
                    self._under_way.popleft()
                    moved = time.monotonic()
                late = time.monotonic() - self._stuck_seconds
                if self._under_way and max(moved, self._under_way[0][0]) < late:
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
        self._aborting = _in_a_thread(self._abort)
        self._aborting.add_done_callback(lambda _: _streams.give_back(self.copies, self._wire))

    def _abort(self) -> None:
        with torch.cuda.device(self._device):
            self._comm.abort()


def _in_a_thread(call: Callable[[], None]) -> asyncio.Future[None]:
    """In one of its own: what waits for a peer must not keep a thread from what ends that wait."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    done.add_done_callback(lambda _: done.cancelled() or done.exception())  # may go unheard

    def settle(error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: Exception | None = None
        try:
            call()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="link", daemon=True).start()
    return done
