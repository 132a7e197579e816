"""Decode's side of one push: judge each payload, write it, and find out that it is there.

A payload is written in the same turn of the loop in which its reservation was checked; one that is
read from the socket into its places, in several turns with a check in each. On a device
the write is only queued then; until it is done nobody else gets the blocks or the payload's memory,
however the push ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.errors import HandoffRefused
from cluster.kv.assembly import Assembly, BlockRun
from cluster.kv.doorkeeper import Admitted
from cluster.kv.generations import Generations
from cluster.kv.paged import BlockIndex, PagedCache, Slots
from cluster.kv.reservation import Reservation
from cluster.kv.transport.checksums import Tally, seed_of
from cluster.kv.transport.frames import Blocks, Coming, Commit
from cluster.kv.transport.seam import Inbound

MAX_WRITES = 32
"""Payloads of a push that wait for the device at once."""


@dataclass
class Landing:
    """Owned by the receiver.

    Args:
        part: what this route owes.
        given_up: called when the last write of a reservation that has failed is done.
    """

    inbound: Inbound
    reservation: Reservation
    admitted: Admitted
    part: Assembly
    cache: PagedCache
    generations: Generations
    given_up: Callable[[Reservation], None]
    _writes: set[asyncio.Task[None]] = field(default_factory=set)
    _held: bool = False

    def __post_init__(self) -> None:
        ids = self.reservation.reserve.block_ids
        self._index: BlockIndex = self.cache.index(ids, self.inbound.stream)

    async def land(self, frame: Blocks | Coming) -> None:
        """Raises HandoffRefused unless the payload is the one that was due."""
        if isinstance(frame, Coming):
            self.part.check(frame.run, frame.size)
            self.reservation.check(self.generations)
            if pieces := self._pieces(frame.run):
                return await self._read(frame, pieces)
            blocks = await self.inbound.fetch(frame, self._seed)
        else:
            blocks = frame
        run, size, tally = blocks.run, blocks.payload.numel(), None
        try:
            self.part.check(run, size)
            if blocks is frame:
                tally = self.inbound.verify(blocks, self._seed)
            self.reservation.check(self.generations)
        except BaseException:
            self.inbound.done(blocks)
            raise
        try:
            self._write(blocks, tally)
        finally:
            self._settle(blocks)  # a write that failed half-way may have queued something, too
        self.part.accept(run, size)
        if len(self._writes) >= MAX_WRITES:
            await asyncio.wait(self._writes, return_when=asyncio.FIRST_COMPLETED)

    @property
    def _seed(self) -> int:
        return seed_of(self.reservation.reserve.handoff_id)

    def _pieces(self, run: BlockRun) -> list[memoryview]:
        """The payload's own places, if they can be written from the host as it comes."""
        if self.admitted.plain:
            return []
        ids = self.reservation.reserve.block_ids
        ids = ids[run.first_block : run.first_block + run.num_blocks]
        layers = range(run.layer, run.layer + run.num_layers)
        return self.cache.pieces(layers, ids, self.admitted.route.target)

    async def _read(self, coming: Coming, pieces: list[memoryview]) -> None:
        """Straight to its places: unverified bytes lie there until the frame is whole, in blocks
        that nothing reads before the commit."""
        await self.inbound.read(
            coming, pieces, lambda: self.reservation.check(self.generations), self._seed
        )
        self.reservation.saw_frame(time.monotonic())
        self.part.accept(coming.run, coming.size)

    async def complete(self, commit: Commit) -> None:
        """Waits for the device. Raises HandoffRefused unless everything is there, as it was sent,
        in blocks that are still the ones reserved."""
        if commit.frames != self.part.frames or not self.part.complete:
            raise HandoffRefused("prefill committed before every block had arrived")
        while self._writes:
            await asyncio.wait(self._writes)
            for write in tuple(self._writes):
                write.result()
        await self.inbound.judge(commit)
        self.reservation.check(self.generations)

    def _write(self, frame: Blocks, tally: Tally | None) -> None:
        run, heads = frame.run, self.admitted.route.target
        stream, reserve = self.inbound.stream, self.reservation.reserve
        if not self._held:
            self.cache.hold(self.reservation.free, stream)
            self._held = True
        layers = range(run.layer, run.layer + run.num_layers)
        if not self.admitted.plain:
            index = self._index[run.first_block : run.first_block + run.num_blocks]
            payload = frame.payload
            return self.cache.scatter(layers, index, heads, payload, stream=stream, tally=tally)
        if tally is not None:
            self.cache.count(frame.payload, tally, stream=stream)
        tokens = self.admitted.prefill.tokens
        slots = Slots(self._index, reserve.held_tokens, reserve.num_tokens)
        first = run.first_block * tokens
        for layer, part in zip(layers, frame.payload.chunk(run.num_layers), strict=True):
            self.cache.scatter_tokens(layer, first, tokens, slots, heads, part, stream=stream)

    def _settle(self, frame: Blocks) -> None:
        self.reservation.writing += 1
        fence = self.cache.mark(self.inbound.stream)
        if fence is None:
            return self._settled(frame)
        write = asyncio.create_task(self.inbound.reached(fence))
        self._writes.add(write)
        write.add_done_callback(lambda _: self._settled(frame, read=not write.cancelled()))
        write.add_done_callback(self._forget)

    def _settled(self, frame: Blocks, read: bool = True) -> None:
        self.reservation.writing -= 1
        self.reservation.saw_frame(time.monotonic())
        self.inbound.done(frame, read)
        if self.reservation.error:
            self.given_up(self.reservation)

    def _forget(self, write: asyncio.Task[None]) -> None:
        """A write that failed is kept, for the commit to fail by it."""
        if not write.cancelled() and write.exception() is None:
            self._writes.discard(write)
