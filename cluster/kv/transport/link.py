"""A link: one NCCL communicator between a prefill rank and a decode rank.

Payloads cross in the order of their headers, which travel on one gRPC stream. Copies are queued on
one stream of the device, transfers on another, and events hold each until the other has done its
part.

Where NCCL can map the receiver's memory, the sender **puts** a payload there by its copy engines,
and its header follows once it is there: neither side's multiprocessors work for it, and the
receiver's device never waits. Else the header goes first and the payload is sent and received, by
kernels that wait for each other.

A link that breaks, stands still for too long, or whose stream ends, is aborted as a whole, on the
device too; what was under way on it is refused. What a peer may still put afterwards ends in the
link's own memory, which was never anything else's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cluster.errors import HandoffRefused
from cluster.kv.milestones import Fence, Milestones
from cluster.kv.transport.checksums import AT_ONCE_BYTES, DeviceSum, Tally
from cluster.kv.transport.in_a_thread import in_a_thread
from cluster.kv.transport.link_slots import LinkSlots
from cluster.kv.transport.link_streams import STREAMS
from cluster.kv.transport.nccl_library import Communicator, NcclError, PeerMemory
from cluster.kv.transport.staging import Slot

log = logging.getLogger(__name__)


MAX_LINKS = 16
"""That an agent has each way."""
WATCH_SECONDS = 0.25
_PAUSE = 1e-3
_FIRST_BYTES = 8


@dataclass(frozen=True)
class LinkTerms:
    """What this end asks of its links.

    Attributes:
        stuck_seconds: a transfer that takes longer has a dead peer.
        max_ctas: thread blocks that a transfer by kernels may take; None: NCCL decides.
        memory_bytes: device memory that a link may take.
    """

    device: torch.device
    stuck_seconds: float
    max_ctas: int | None
    memory_bytes: int


class Link:
    """One end. Lives on the agent's event loop.

    Args:
        rank: 0 sends, 1 receives.
        slots: of its memory, as many as at the other end.
        slot_bytes: the same there.

    Attributes:
        broken: why it is down; empty while it is up.
        used_at: CLOCK_MONOTONIC seconds.
        copies: the stream on which slots are filled, or read.
        puts: payloads are put into the peer's memory; known once it is up.
        stuck_seconds: see `LinkTerms`.
    """

    def __init__(
        self,
        unique_id: bytes,
        rank: int,
        terms: LinkTerms,
        slots: int,
        slot_bytes: int,
    ) -> None:
        device = self.device = terms.device
        self._rank = rank
        self.stuck_seconds = terms.stuck_seconds
        self._shape = slots, slot_bytes
        self._memory: PeerMemory | None = None
        self._slots: LinkSlots | None = None
        self.puts = False
        self.broken = ""
        self.used_at = time.monotonic()
        self.copies, self._wire = STREAMS.take(device), STREAMS.take(device)
        self._milestones = Milestones("link", device)
        self._under_way: deque[tuple[float, Any]] = deque()
        self._aborting: asyncio.Future[None] | None = None
        self._when_down: list[Callable[[], None]] = []
        self._warm_up()
        self._comm = Communicator(unique_id, rank, terms.max_ctas)
        self._watcher = asyncio.create_task(self._watch())

    @property
    def slots(self) -> LinkSlots:
        """Its memory, once it is up."""
        assert self._slots is not None
        return self._slots

    async def up(self) -> None:
        """Waits for the peer to join. Raises HandoffRefused if it does not."""
        try:
            async with asyncio.timeout(self.stuck_seconds):
                await self._settle()
                self._comm.split()
                await self._settle()
                # The first transfer waits for the peer on the host, the others do not.
                began = in_a_thread(self._begin)
                try:
                    await asyncio.shield(began)
                    self._raise_if_broken()
                except BaseException:
                    self.abort("the link did not come up")
                    began.add_done_callback(lambda _: self._give_up_memory())
                    raise
        except TimeoutError:
            self.abort("the peer did not join the link")
            raise HandoffRefused("the peer did not join the link") from None
        assert self._memory is not None
        self._slots = LinkSlots(self._memory.bytes.view(self._shape), self._give_up_memory)

    def _begin(self) -> None:
        with torch.cuda.device(self.device):
            memory = self._memory = PeerMemory(self._shape[0] * self._shape[1])
            try:
                self.puts = self._comm.expose(memory)
            except NcclError as error:
                log.info("transfers over the link take kernels: %s", error)
            if not self.puts:
                transfer = self._comm.send if self._rank == 0 else self._comm.receive
                transfer(memory.bytes.data_ptr(), _FIRST_BYTES, self._wire.cuda_stream)
                self._wire.synchronize()

    def _warm_up(self) -> None:
        """Has memory for what is queued on `copies` allocated now: an allocation can wait for the
        whole device, and the device may be waiting for a payload."""
        with torch.cuda.stream(self.copies):
            payload = torch.zeros(AT_ONCE_BYTES, dtype=torch.uint8, device=self.device)
            Tally(DeviceSum(self.device, self.copies, 0), 0).count(payload)

    def put(self, slot: Slot, filled: Fence | None) -> Fence:
        """Queues the copying of a payload to the peer's memory behind `filled`; returns the fence
        behind it. Only where the link `puts`."""
        self._raise_if_broken()
        if filled is not None:
            self._wire.wait_event(filled)
        payload = slot.payload
        self._comm.put(payload.data_ptr(), payload.numel(), self._wire.cuda_stream)
        return self._fence()

    async def send(self, slot: Slot, filled: Fence | None) -> Fence:
        """Queues the sending of a payload behind `filled`; returns the fence behind it."""
        self._raise_if_broken()
        if filled is not None:
            self._wire.wait_event(filled)
        return await self._queue(self._comm.send, slot)

    async def receive(self, slot: Slot) -> None:
        """Queues the next payload's arrival, if it has not been put there; `copies` goes on once it
        is there."""
        self._raise_if_broken()
        self.used_at = time.monotonic()
        if not self.puts:
            self.copies.wait_event(await self._queue(self._comm.receive, slot))

    async def _queue(self, transfer: Any, slot: Slot) -> Fence:
        transfer(slot.payload.data_ptr(), slot.payload.numel(), self._wire.cuda_stream)
        await self._settle()
        return self._fence()

    def _fence(self) -> Fence:
        fence: Fence = torch.cuda.Event(blocking=True)
        self._wire.record_event(fence)
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
                late = time.monotonic() - self.stuck_seconds
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
        self._aborting = in_a_thread(self._abort)
        self._aborting.add_done_callback(lambda _: STREAMS.give_back(self.copies, self._wire))
        if self._slots is not None:
            self._slots.close(self.broken)
        for call in self._when_down:
            call()

    def when_down(self, call: Callable[[], None]) -> None:
        """Calls it once the link is down."""
        if self.broken:
            return call()
        self._when_down.append(call)

    def _abort(self) -> None:
        with torch.cuda.device(self.device):
            try:
                if self.puts:  # they end by themselves; the peer's memory is reached until then
                    self._wire.synchronize()
            finally:
                self._comm.abort()

    def _give_up_memory(self) -> None:
        """Nobody uses a slot any more."""
        assert self._aborting is not None
        self._aborting.add_done_callback(lambda _: in_a_thread(self._free_memory))

    def _free_memory(self) -> None:
        with torch.cuda.device(self.device):
            if self._memory is not None:
                self._memory.free()
