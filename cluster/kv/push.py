"""One route of a handoff, from prefill's side: wait for the grant, push group by group, commit.

A **ready** item is one layer of the blocks that one engine step completed. Items of the same blocks
in following layers cross in one frame, up to the size that the transport likes; the last layer of a
step always goes at once. Over a link whatever is ready waits until a burst of it is due.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.generations import Generations, Stamp
from cluster.kv.milestones import Milestones
from cluster.kv.orders import Order, Ready, Sent, frame_size
from cluster.kv.paged import BlockIndex, PagedCache
from cluster.kv.reads import Reads
from cluster.kv.transport.checksums import seed_of
from cluster.kv.transport.frames import Ack, Commit, Grant, Open, Refused, Reply
from cluster.kv.transport.seam import Buffer, Outbound, Transport


@dataclass
class Push:
    """One route under way. Owned by its `Sender`, on the agent's event loop.

    Args:
        granted: called once when the grant comes.
        milestones: of the engine's compute.
    """

    order: Order
    cache: PagedCache
    generations: Generations
    transport: Transport
    granted: Callable[[], None]
    milestones: Milestones
    sent: Sent = field(default_factory=Sent)
    ready: deque[Ready] = field(default_factory=deque)
    first_token: int | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _gathering: list[Ready] = field(default_factory=list)
    _bursts: bool = True
    _indexes: dict[int, tuple[Stamp, BlockIndex]] = field(default_factory=dict)
    _when_read: list[Callable[[], None]] = field(default_factory=list)
    _over: bool = False

    def __post_init__(self) -> None:
        self._reads = Reads(self.generations)

    def add(self, ready: Ready) -> None:
        """More to send."""
        self._gathering.append(ready)
        if ready.due or not self._bursts:
            self._go()

    def _go(self) -> None:
        """What has gathered leaves; over a link all of it once the last one is there."""
        if self._bursts and self._gathering:
            fence = self._gathering[-1].fence
            self.ready += [replace(ready, fence=fence) for ready in self._gathering]
        else:
            self.ready += self._gathering
        self._gathering.clear()
        self._changed.set()

    def clear(self) -> None:
        """Nothing of what was added is to be sent."""
        self.ready.clear()
        self._gathering.clear()

    def when_read(self, call: Callable[[], None]) -> None:
        """Calls it once all that was added has been read from the cache, or never will be."""
        if self._over:
            return call()
        self._when_read.append(call)
        self._go()

    @property
    def unread(self) -> bool:
        """Somebody waits for what was added to be read."""
        return bool(self._when_read)

    def _all_read(self) -> None:
        calls, self._when_read = self._when_read, []
        for call in calls:
            call()

    def finish(self, first_token: int) -> None:
        """Nothing more will be added; decode goes on after the token."""
        self.first_token = first_token
        self._go()

    async def run(self) -> None:
        """Returns when decode has acknowledged everything.

        Raises:
            HandoffRefused: it failed, and why.
        """
        try:
            await self._run()
        finally:
            self._over = True
            self._all_read()

    async def _run(self) -> None:
        order = self.order
        outbound = await self.transport.open(order.peer, order.handoff_id)
        self.sent.transport = outbound.transport
        try:
            rank = order.route.prefill_rank
            # The engine waits for blocks that it does not keep: they leave as they are computed.
            self._bursts = outbound.bursts and self.cache.kept
            if not self._bursts:
                self._go()
            await outbound.send(Open(order.ticket.encode(), rank, outbound.link))
            for ready in itertools.islice(itertools.chain(self.ready, self._gathering), 1):
                self._index(ready, outbound)  # while decode makes up its mind
            grant = await outbound.receive()
            if not isinstance(grant, Grant):
                raise HandoffRefused(_refusal(grant))
            self.sent.granted_at = time.monotonic()
            self.sent.held_tokens = grant.held_tokens
            self.granted()
            reply = asyncio.create_task(outbound.receive())
            reply.add_done_callback(lambda _: self._changed.set())
            try:
                await self._stream(grant, outbound, reply)
            except HandoffRefused:
                if reply.done() and not reply.exception():  # it knows better why
                    raise HandoffRefused(_refusal(reply.result())) from None
                raise
            finally:
                reply.cancel()
                reply.add_done_callback(lambda _: reply.cancelled() or reply.exception())
        finally:
            outbound.cancel()

    async def _stream(self, grant: Grant, outbound: Outbound, reply: asyncio.Task[Reply]) -> None:
        """Sends what is ready until the engine is done, then commits and awaits the verdict."""
        while True:
            self._changed.clear()
            while group := self._group(outbound.frame_bytes):
                if reply.done():
                    raise HandoffRefused(_refusal(reply.result()))
                await self._send(group, grant, outbound)
            if reply.done():
                raise HandoffRefused(_refusal(reply.result()))
            if self._when_read and not self.ready:
                await self._reads.checked()
                self._all_read()
            if self.first_token is not None and not self.ready:
                break
            await self._changed.wait()
        checksum = await outbound.flush()
        await self._reads.checked()
        await outbound.send(
            Commit(self.sent.frames, self.first_token, self.order.num_tokens, checksum)
        )
        verdict = await reply
        if not isinstance(verdict, Ack):
            raise HandoffRefused(_refusal(verdict))

    def _group(self, frame_bytes: int) -> list[Ready]:
        """Takes the next items that make a frame; none while more layers are to join them."""
        if not self.ready:
            return []
        size = len(self.ready[0].block_ids) * self._head_bytes
        if not self._bursts:
            frame_bytes = frame_size(frame_bytes, size * self.cache.num_layers)
        room = max(1, frame_bytes // size)
        group: list[Ready] = []
        for item in itertools.islice(self.ready, room):
            if group and not group[-1].goes_on(item):
                break
            group.append(item)
            if item.due:  # what is behind it may take longer
                break
        full = len(group) == room or len(group) < len(self.ready) or group[-1].due
        if not (full or self.first_token is not None):
            return []
        for _ in group:
            self.ready.popleft()
        return group

    @property
    def _head_bytes(self) -> int:
        """Bytes of one block of one layer on this route."""
        return self.order.route.source.count * self.cache.head_block_bytes

    async def _send(self, group: list[Ready], grant: Grant, outbound: Outbound) -> None:
        """One frame, or several where a single layer is larger than a frame."""
        head = group[0]
        index = self._index(head, outbound)
        await self.milestones.reached(group[-1].fence)
        self.sent.first_frame_at = self.sent.first_frame_at or time.monotonic()
        skip = max(0, grant.held_tokens // self.cache.tokens - head.first_block)
        step = max(1, outbound.frame_bytes // (len(group) * self._head_bytes))
        for start in range(skip, len(head.block_ids), step):
            part = index[start : start + step]
            ids = head.block_ids[start : start + step]
            self._reads.check(head)
            size = len(group) * len(part) * self._head_bytes
            if self.sent.bytes + size > grant.credit_bytes:
                raise HandoffRefused("decode granted less than the prompt needs")
            run = BlockRun(
                self.sent.frames, head.layer, len(group), head.first_block + start, len(part)
            )
            if pieces := self._pieces(group, ids):
                await outbound.send_pieces(run, pieces, self._seed)
                self._reads.check(head)
            else:
                await self._send_copy(run, group, part, outbound, size)
            self.sent.frames += 1
            self.sent.bytes += size
            self.sent.last_frame_at = time.monotonic()

    async def _send_copy(
        self, run: BlockRun, group: list[Ready], index: BlockIndex, outbound: Outbound, size: int
    ) -> None:
        buffer = await outbound.buffer(size)
        try:
            self._fill(run, buffer, index, outbound)
            filled = self.cache.mark(outbound.stream)
            if filled is None:
                self._reads.check(group[0])
            else:
                self._reads.check_behind(filled, group[0], outbound)
        except BaseException:
            outbound.discard(buffer)
            raise
        await outbound.send_blocks(run, buffer, self._seed, filled)

    @property
    def _seed(self) -> int:
        return seed_of(self.order.handoff_id)

    def _pieces(self, group: list[Ready], ids: tuple[int, ...]) -> list[memoryview]:
        """The blocks where they lie, if they can be sent from there."""
        if self.order.plain:
            return []
        layers = range(group[0].layer, group[-1].layer + 1)
        return self.cache.pieces(layers, ids, self.order.route.source)

    def _index(self, ready: Ready, outbound: Outbound) -> BlockIndex:
        """Of the blocks of a step, made once."""
        known = self._indexes.get(id(ready.stamp))
        if known is None:
            index = self.cache.index(ready.block_ids, outbound.stream)
            known = self._indexes[id(ready.stamp)] = (ready.stamp, index)
        return known[1]

    def _fill(
        self,
        run: BlockRun,
        buffer: Buffer,
        index: BlockIndex,
        outbound: Outbound,
    ) -> None:
        self.cache.gather(
            range(run.layer, run.layer + run.num_layers),
            index,
            self.order.route.source,
            buffer.payload,
            plain=self.order.plain,
            stream=outbound.stream,
            tally=outbound.tally(run.sequence),
        )


def _refusal(reply: Reply) -> str:
    return reply.reason if isinstance(reply, Refused) else "the decode worker broke the protocol"
