"""Engines and handoffs on a virtual clock: the simulated engine's own scheduler and times."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from bench.replay.traces import BLOCK, Arrival
from cluster.config_models import SimulationConfig
from cluster.engine.simulated.scheduler import Scheduler, Sequence, Shape, Step
from cluster.engine.simulated.timing import Timing
from router.fleet import Fleet
from router.prefix_index import PrefixIndex

LAG_SECONDS = 0.1
"""Of what routers are told of prefix caches."""

KV_TOKENS = 600_000
SHAPE = Shape(BLOCK, KV_TOKENS // BLOCK, 2048, 256)
TIMING = Timing.of(SimulationConfig())


@dataclass
class Served:
    """A request on its way.

    Attributes:
        first_at, last_at: when tokens came; cached: prompt tokens that prefill found.
    """

    name: str
    arrival: Arrival
    started_at: float = 0.0
    first_at: float = 0.0
    second_at: float = 0.0
    last_at: float = 0.0
    tokens: int = 0
    cached: int = 0
    moved: int = 0
    exposed: float = 0.0
    on_first: Callable[[], None] = field(default=lambda: None)
    on_end: Callable[[], None] = field(default=lambda: None)


class Clock:
    """What happens, in order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, act))

    def run(self) -> None:
        while self._heap:
            self.now, _, act = heapq.heappop(self._heap)
            act()


class Worker:
    """One engine; tells the fleet's index of its prefix cache after a lag."""

    def __init__(self, clock: Clock, slot: int, fleet: Fleet) -> None:
        self._clock = clock
        self._slot = slot
        self._index: PrefixIndex = fleet.index
        self.scheduler = Scheduler(SHAPE, TIMING)
        self._stepping = False
        self._sampled: dict[str, Callable[[Sequence], None]] = {}
        self._reserved: dict[str, Callable[[], None]] = {}

    def add(
        self,
        sequence: Sequence,
        sampled: Callable[[Sequence], None],
        reserved: Callable[[], None] = lambda: None,
    ) -> None:
        self._sampled[sequence.sequence_id] = sampled
        self._reserved[sequence.sequence_id] = reserved
        self.scheduler.add(sequence)
        self.wake()

    def end(self, sequence_id: str) -> list[int]:
        """Takes it out; the caller releases its blocks."""
        del self._sampled[sequence_id], self._reserved[sequence_id]
        return self.scheduler.remove(sequence_id)

    def release(self, blocks: list[int]) -> None:
        self.scheduler.pool.release(blocks)
        self.wake()

    def wake(self) -> None:
        if self._stepping:
            return
        step = self.scheduler.begin(self._clock.now)
        waiting, self.scheduler.reserved = self.scheduler.reserved, []
        for sequence in waiting:
            self._reserved[sequence.sequence_id]()
        if step is not None:
            self._stepping = True
            self._clock.after(step.seconds, lambda: self._finish(step))

    def _finish(self, step: Step) -> None:
        self._stepping = False
        for sequence in self.scheduler.finish(step):
            self._sampled[sequence.sequence_id](sequence)
        pool = self.scheduler.pool
        if pool.stored or pool.removed:
            stored = np.array(pool.stored, dtype=np.uint64)
            removed = np.array(pool.removed, dtype=np.uint64)
            pool.stored, pool.removed = [], []
            self._clock.after(LAG_SECONDS, lambda: self._tell(stored, removed))
        self.wake()

    def _tell(self, stored: np.ndarray, removed: np.ndarray) -> None:
        self._index.remove(self._slot, removed)
        self._index.add(self._slot, stored)


class World:
    """Workers, and requests that run on them as placement said."""

    def __init__(self, clock: Clock, workers: list[Worker]) -> None:
        self._clock = clock
        self._workers = workers

    def whole(self, served: Served, slot: int) -> None:
        worker = self._workers[slot]

        def sampled(sequence: Sequence) -> None:
            served.cached = max(0, sequence.cached)
            served.started_at = sequence.scheduled_at
            self._token(served, sequence.generated)
            if sequence.generated >= sequence.output:
                worker.release(worker.end(sequence.sequence_id))
                served.on_end()

        worker.add(_sequence(served, served.arrival.output), sampled)

    def split(self, served: Served, first: int, rest: int) -> None:
        prefill, decode = self._workers[first], self._workers[rest]
        remote = _sequence(served, served.arrival.output, remote=True)
        ready: set[str] = set()
        blocks: list[int] = []

        def half(which: str) -> None:
            """Both the reservation and the prompt are there: the rest of the transfer begins."""
            ready.add(which)
            if len(ready) == 2:
                served.moved = served.arrival.prompt - max(0, remote.cached)
                left = TIMING.handoff(min(served.moved, SHAPE.max_tokens))
                self._clock.after(left, landed)

        def landed() -> None:
            served.exposed = self._clock.now - served.first_at
            prefill.release(blocks)
            decode.scheduler.landed(served.name)
            decode.wake()

        def computed(sequence: Sequence) -> None:
            served.cached = max(0, sequence.cached)
            served.started_at = sequence.scheduled_at
            self._token(served, 1)
            blocks.extend(prefill.end(sequence.sequence_id))
            half("computed")

        def sampled(sequence: Sequence) -> None:
            self._token(served, sequence.generated)
            if sequence.generated >= sequence.output:
                decode.release(decode.end(sequence.sequence_id))
                served.on_end()

        decode.add(remote, sampled, lambda: half("reserved"))
        prefill.add(_sequence(served, 1), computed)

    def _token(self, served: Served, count: int) -> None:
        now = self._clock.now
        served.tokens, served.last_at = count, now
        if count == 1:
            served.first_at = now
            served.on_first()
        elif count == 2:
            served.second_at = now


def _sequence(served: Served, output: int, remote: bool = False) -> Sequence:
    arrival = served.arrival
    return Sequence(served.name, arrival.prompt, output, arrival.names.tolist(), remote)
