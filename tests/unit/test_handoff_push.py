"""A push from a device: what leaves when, and that nothing is committed before what was read has
been looked at again. The cache is the host's; its fences are reached when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.generations import Generations
from cluster.kv.geometry import HeadRun, Route
from cluster.kv.milestones import Milestones
from cluster.kv.orders import Order, Ready
from cluster.kv.paged import PagedCache
from cluster.kv.push import Push
from cluster.kv.transport.frames import Ack, Commit, Grant, Open
from tests.unit.test_milestones import Point, until

LAYERS, BLOCKS, HEADS, TOKENS, CONTENT = 4, 16, 1, 2, 8
LAYER_BYTES = 2 * HEADS * TOKENS * CONTENT * 4
"""Of the two blocks that a step completes here."""


class Wire:
    """The way to decode."""

    transport, link, stream = "test", 1, None

    def __init__(self, bench: Bench, bursts: bool) -> None:
        self.bursts = bursts
        self.frame_bytes = 1 << 20
        self.said: list[object] = []
        self.replies: asyncio.Queue[object] = asyncio.Queue()
        self._bench = bench

    async def buffer(self, size: int) -> Any:
        return SimpleNamespace(payload=torch.empty(size, dtype=torch.uint8))

    def discard(self, buffer: object) -> None: ...

    def tally(self, sequence: int) -> None: ...

    async def send_blocks(self, run: BlockRun, *rest: object) -> None:
        self.said.append(run)

    async def reached(self, filled: Point) -> None:
        await self._bench.milestones.reached(filled)

    async def flush(self) -> int:
        for filled in self._bench.filled:
            await self.reached(filled)
        return 0

    async def send(self, frame: object) -> None:
        self.said.append(frame)

    async def receive(self) -> Any:
        return await self.replies.get()

    def cancel(self) -> None: ...

    @property
    def runs(self) -> list[tuple[int, int]]:
        """First layer and number of layers of what has left."""
        return [(run.layer, run.num_layers) for run in self.said if isinstance(run, BlockRun)]

    @property
    def committed(self) -> bool:
        return any(isinstance(frame, Commit) for frame in self.said)


class Bench:
    """A push that has been granted all it may ask for."""

    def __init__(self, bursts: bool, kept: bool = True) -> None:
        shape = (BLOCKS, HEADS, TOKENS, CONTENT)
        layers = {f"layer.{i}": torch.rand(shape) for i in range(LAYERS)}
        cache: Any = PagedCache(layers, kept=kept)
        cache._places, cache.mark = None, self._mark
        self.filled: list[Point] = []
        self.milestones = Milestones("test")
        self.generations = Generations(BLOCKS)
        self.wire = Wire(self, bursts)
        whole = HeadRun(0, HEADS)
        ticket: Any = SimpleNamespace(encode=lambda: b"ticket")
        peer: Any = None
        order = Order("ab" * 16, ticket, 99, Route(0, 0, whole, whole), peer, plain=False)
        transport: Any = SimpleNamespace(open=self._open)
        self.push = Push(order, cache, self.generations, transport, lambda: None, self.milestones)
        self.running = asyncio.create_task(self.push.run())
        self.wire.replies.put_nowait(Grant(0, 1 << 30))

    def _mark(self, stream: object = None) -> Point:
        self.filled.append(Point())
        return self.filled[-1]

    async def _open(self, *peer: object) -> Wire:
        return self.wire

    def compute(
        self, block_ids: tuple[int, ...], first: int, due: Sequence[int], fence: Point | None = None
    ) -> None:
        """A step of all layers; those in `due` let what is ready leave."""
        stamp = self.generations.stamp(block_ids)
        for layer in range(LAYERS):
            self.push.add(Ready(layer, first, block_ids, stamp, fence, layer in due))


async def pause() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("bursts", [True, False])
@pytest.mark.parametrize("stale", [None, 0, 1, 2])
async def test_nothing_is_committed_before_all_that_was_read_was_looked_at_again(
    bursts: bool, stale: int | None
) -> None:
    bench = Bench(bursts)
    for step in range(3):
        bench.compute((2 * step + 1, 2 * step + 2), 2 * step, due=[LAYERS - 1])
        await until(lambda: len(bench.filled) == step + 1)  # noqa: B023 - awaited here
    bench.push.finish(7)
    for step, filled in enumerate(bench.filled):
        await pause()
        assert not bench.wire.committed
        if stale == step:
            bench.generations.renew([2 * step + 1])
        filled.reach()
    if stale is None:
        await until(lambda: bench.wire.committed)
        bench.wire.replies.put_nowait(Ack())
        await bench.running
        assert isinstance(bench.wire.said[0], Open)
    else:
        with pytest.raises(HandoffRefused, match="handed out anew"):
            await bench.running
        assert not bench.wire.committed


async def test_a_burst_leaves_when_the_last_of_it_is_computed() -> None:
    bench = Bench(bursts=True)
    await pause()
    half, rest = Point(), Point()
    stamp = bench.generations.stamp((1, 2))
    for layer in range(LAYERS):
        fence = Point()
        fence.reach()  # a layer of a burst is there, and waits for the others
        last = {1: half, LAYERS - 1: rest}.get(layer, fence)
        bench.push.add(Ready(layer, 0, (1, 2), stamp, last, layer in (1, LAYERS - 1)))
    await pause()
    assert bench.wire.runs == []
    half.reach()
    await until(lambda: bench.wire.runs == [(0, 2)])
    await pause()
    assert bench.wire.runs == [(0, 2)]
    rest.reach()
    await until(lambda: bench.wire.runs == [(0, 2), (2, LAYERS - 2)])
    bench.running.cancel()


@pytest.mark.parametrize("kept", [True, False])
async def test_what_the_engine_does_not_keep_waits_for_no_burst(kept: bool) -> None:
    bench = Bench(bursts=True, kept=kept)
    bench.wire.frame_bytes = LAYER_BYTES
    await pause()
    bench.push.add(Ready(0, 0, (1, 2), bench.generations.stamp((1, 2)), None, due=False))
    await pause()
    assert bool(bench.wire.runs) == (not kept)
    bench.running.cancel()


async def test_whoever_waits_for_all_to_be_read_waits_for_what_gathers() -> None:
    bench = Bench(bursts=True)
    await pause()
    bench.push.add(Ready(0, 0, (1, 2), bench.generations.stamp((1, 2)), None, due=False))
    read: list[bool] = []
    bench.push.when_read(lambda: read.append(True))
    await pause()
    assert not read
    bench.push.finish(7)
    await until(lambda: bool(bench.filled))
    bench.filled[0].reach()
    await until(lambda: bool(read))
    bench.running.cancel()
