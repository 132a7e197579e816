"""The simulated engine: the scheduler and its timing behind the Engine protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import psutil

from cluster.config import ModelConfig
from cluster.engine.blocks import HeldBlocks
from cluster.engine.protocol import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    Holdings,
    PinnedKv,
)
from cluster.engine.results import HandoffResults
from cluster.engine.simulated.port import TransferPort
from cluster.engine.simulated.push import Push
from cluster.engine.simulated.running import Running
from cluster.engine.simulated.scheduler import Scheduler, Sequence, Shape
from cluster.engine.simulated.timing import Timing
from cluster.engine.simulated.tokens import TokenSource, refuse_unsimulated
from cluster.engine.simulated.wire import TRANSPORT
from cluster.errors import EngineFailed
from cluster.kv.handoff import HandoffParams, HandoffResult
from cluster.prefix import block_hashes
from cluster.ticket import TicketSigner


@dataclass(frozen=True)
class _Pinned:
    """Blocks whose push goes on after their request has ended."""

    blocks: list[int]
    expires_at: float


class SimulatedEngine:
    """One engine without a network. Arguments as VllmEngine's."""

    def __init__(
        self, model: ModelConfig, worker_id: str, incarnation: str, secret: bytes, host: str
    ) -> None:
        simulation = model.simulation
        self._model = model
        self._host = host
        self._timing = Timing.of(simulation)
        self._shape = Shape(
            model.block_size,
            simulation.num_blocks,
            model.max_num_batched_tokens,
            model.max_num_seqs,
        )
        self._scheduler = Scheduler(self._shape, self._timing)
        self._layout = f"{TRANSPORT}:{model.name}:{model.block_size}"
        self._results = HandoffResults(1)
        self._port = TransferPort(
            TicketSigner(secret),
            worker_id,
            incarnation,
            self._layout,
            simulation.kv_bytes_per_token,
            self._landed,
            self._received,
        )
        self._running: dict[str, Running] = {}
        self._pinned: dict[str, _Pinned] = {}
        self._pushes: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._failed: asyncio.Future[str] | None = None
        self._loop: asyncio.Task[None] | None = None
        self.held_blocks = HeldBlocks()

    async def start(self) -> EngineInfo:
        assert self._model.max_model_len is not None  # its configuration sees to that
        address = await self._port.open(self._host)
        self._failed = asyncio.get_running_loop().create_future()
        self._loop = asyncio.create_task(self._run(), name="simulated engine")
        self._loop.add_done_callback(self._broke)
        return EngineInfo(
            transfer_addresses=(address,),
            transport=TRANSPORT,
            layout=self._layout,
            block_size=self._shape.block_size,
            num_blocks=self._shape.num_blocks,
            max_model_len=self._model.max_model_len,
            vocab_size=self._model.simulation.vocab_size,
            simulated=True,
        )

    async def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        running = self._add(request)
        try:
            while True:
                output = await running.outputs.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._end(running)

    def _add(self, request: EngineRequest) -> Running:
        if self._loop is None or self._loop.done():
            raise EngineFailed("the engine is not running")
        refuse_unsimulated(request.sampling)
        names = block_hashes(request.prompt_token_ids, self._shape.block_size, request.cache_salt)
        handoff = request.handoff
        sequence = Sequence(
            request.sequence_id,
            len(request.prompt_token_ids),
            request.sampling.max_tokens,
            names.tolist(),
            remote=handoff is not None and handoff.side == "decode",
        )
        seed = self._model.simulation.seed ^ (request.sampling.seed or 0)
        vocabulary = self._model.simulation.vocab_size
        source = TokenSource(request.prompt_token_ids, seed, vocabulary)
        running = Running(request, sequence, source)
        self._running[request.sequence_id] = running
        self._scheduler.add(sequence)
        self._wake.set()  # First, so that the step begins before the push connects.
        if handoff is not None:
            if handoff.side == "decode":
                self._port.expect(handoff, request.sequence_id)
            else:
                self._push(running, handoff)
        return running

    def _push(self, running: Running, handoff: HandoffParams) -> None:
        token: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        running.push = Push(handoff, self._timing, self._shape.max_tokens, token)
        running.pushing = asyncio.create_task(self._carry(running.push))
        self._pushes.add(running.pushing)
        running.pushing.add_done_callback(self._pushes.discard)

    async def _carry(self, push: Push) -> None:
        result = await push.run()
        self._results.add(result)
        pinned = self._pinned.pop(push.params.handoff_id, None)
        if pinned is not None:
            self._scheduler.pool.release(pinned.blocks)
            self._wake.set()

    def _end(self, running: Running) -> None:
        """The request is over, in whatever way; the push of a first token that is out goes on."""
        del self._running[running.request.sequence_id]
        blocks = self._scheduler.remove(running.request.sequence_id)
        handoff, push = running.request.handoff, running.push
        if push is not None and not push.first_token.done():
            push.first_token.cancel()
        if push is not None and running.pushing is not None and not running.pushing.done():
            expires_at = time.monotonic() + push.params.expires_in
            self._pinned[push.params.handoff_id] = _Pinned(blocks, expires_at)
        else:
            self._scheduler.pool.release(blocks)
        if handoff is not None and handoff.side == "decode":
            self._port.forget(handoff.handoff_id)
        self._wake.set()

    async def _run(self) -> None:
        """Steps back to back; each ends when its time is over, measured from the one before."""
        ends = 0.0
        while True:
            now = time.monotonic()
            step = self._scheduler.begin(now)
            for sequence in self._scheduler.reserved:
                self._reserved(sequence)
            self._scheduler.reserved.clear()
            if step is None:
                self._wake.clear()
                await self._wake.wait()
                ends = 0.0  # what idled makes no step shorter
                continue
            # A step that began as the last one ended is not made longer by a late timer.
            late = now - ends
            ends = (ends if 0 <= late < step.seconds else now) + step.seconds
            await asyncio.sleep(max(0.0, ends - time.monotonic()))
            for sequence in self._scheduler.finish(step):
                self._sampled(sequence)
            pool = self._scheduler.pool
            if pool.stored or pool.removed:
                self.held_blocks.change(pool.stored, pool.removed)
                pool.stored, pool.removed = [], []

    def _reserved(self, sequence: Sequence) -> None:
        running = self._running.get(sequence.sequence_id)
        if running is not None and running.request.handoff is not None:
            self._port.reserved(running.request.handoff.handoff_id, sequence.cached)

    def _sampled(self, sequence: Sequence) -> None:
        running = self._running.get(sequence.sequence_id)
        if running is None:
            return
        self._take(running, running.tokens.draw())

    def _landed(self, sequence_id: str, first_token: int) -> None:
        running = self._running.get(sequence_id)
        if running is None:
            return
        if running.tokens.draw() != first_token:
            running.fail()
            return
        self._scheduler.landed(sequence_id)
        self._take(running, first_token)
        self._wake.set()

    def _take(self, running: Running, token: int) -> None:
        if running.take(token):
            # Its blocks stay until the reader of the outputs has seen the end.
            self._scheduler.stop(running.sequence.sequence_id)

    def _received(self, result: HandoffResult) -> None:
        self._results.add(result)
        if result.error:
            for running in self._running.values():
                handoff = running.request.handoff
                if handoff is not None and handoff.handoff_id == result.handoff_id:
                    running.fail()

    def expect_handoff(self, handoff_id: str) -> None:
        self._results.expect(handoff_id)

    async def handoff_result(self, handoff_id: str) -> HandoffResult:
        return await self._results.wait(handoff_id)

    def forget_handoff(self, handoff_id: str) -> None:
        self._results.forget(handoff_id)

    async def holdings(self) -> Holdings:
        pool, size = self._scheduler.pool, self._shape.block_size
        per_block = size * self._model.simulation.kv_bytes_per_token
        now = time.monotonic()
        pinned = [
            PinnedKv(name, "sending", len(p.blocks), len(p.blocks) * per_block, p.expires_at - now)
            for name, p in self._pinned.items()
        ]
        for running in self._running.values():
            handoff, blocks = running.request.handoff, len(running.sequence.blocks)
            if handoff is not None and not running.landed and blocks:
                reason = "sending" if handoff.side == "prefill" else "reserved"
                name = handoff.handoff_id
                entry = PinnedKv(name, reason, blocks, blocks * per_block, handoff.expires_in)
                pinned.append(entry)
        resident = {"front end": psutil.Process().memory_info().rss}
        return Holdings(tuple(pinned), pool.used, pool.total, resident)

    async def dead(self) -> str:
        assert self._failed is not None
        return await asyncio.shield(self._failed)

    async def stop(self) -> None:
        self._port.close()
        tasks = [task for task in (self._loop, *self._pushes) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _broke(self, task: asyncio.Task[None]) -> None:
        if self._failed is not None and not self._failed.done() and not task.cancelled():
            self._failed.set_result(f"the simulated engine broke: {task.exception()!r}")
            for running in self._running.values():
                running.fail()
