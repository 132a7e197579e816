"""The simulated engine's scheduler: continuous batching, chunked prefill, preemption. Pure.

`begin` says what the next step computes and how long it takes; `finish`, called when that time is
over, what came of it. Between the two nothing may be added to the step; sequences may come and go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.engine.simulated.blocks import BlockPool
from cluster.engine.simulated.timing import Timing


@dataclass(frozen=True)
class Shape:
    """An engine's limits; tokens and sequences are per step."""

    block_size: int
    num_blocks: int
    max_tokens: int
    max_sequences: int


@dataclass(eq=False)
class Sequence:
    """One request in the scheduler.

    Attributes:
        names: of the prompt's full blocks.
        remote: its KV comes from another engine; it waits until `landed`.
        output: tokens it will generate.
        computed: tokens whose KV is here.
        cached: prompt tokens that were found in the prefix cache.
        scheduled_at: when it was first computed for.
    """

    sequence_id: str
    prompt: int
    output: int
    names: list[int]
    remote: bool = False
    computed: int = 0
    generated: int = 0
    cached: int = -1
    scheduled_at: float = 0.0
    preempted: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that it consists of now."""
        return self.prompt + self.generated

    @property
    def decoding(self) -> bool:
        return self.computed >= self.length - 1


@dataclass(frozen=True)
class Step:
    """Work of one step: tokens to compute per sequence, and how long that takes."""

    work: tuple[tuple[Sequence, int], ...]
    seconds: float


class Scheduler:
    """The sequences of one engine and its blocks."""

    def __init__(self, shape: Shape, timing: Timing) -> None:
        self._shape = shape
        self._timing = timing
        self._by_id: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._parked: dict[str, Sequence] = {}
        self._running: dict[str, Sequence] = {}
        self.pool = BlockPool(shape.num_blocks)
        self.reserved: list[Sequence] = []
        """Remote sequences that got their blocks; the reader empties it."""

    @property
    def idle(self) -> bool:
        return not self._by_id

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.sequence_id] = sequence
        self._waiting.append(sequence)

    def landed(self, sequence_id: str) -> None:
        """The KV of a parked sequence's prompt is here, and its first token: the next step gives
        it the second."""
        sequence = self._parked.pop(sequence_id, None)
        if sequence is not None:
            sequence.computed, sequence.generated = sequence.prompt, 1
            self._name_blocks(sequence)
            self._running[sequence_id] = sequence

    def stop(self, sequence_id: str) -> None:
        """It has its last token; its blocks stay until `remove`."""
        self._running.pop(sequence_id, None)

    def remove(self, sequence_id: str) -> list[int]:
        """Takes a sequence out, wherever it is; the caller releases the blocks that it held."""
        sequence = self._by_id.pop(sequence_id, None)
        if sequence is None:
            return []
        self._running.pop(sequence_id, None)
        self._parked.pop(sequence_id, None)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        blocks, sequence.blocks = sequence.blocks, []
        return blocks

    def begin(self, now: float) -> Step | None:
        """The next step; None if nothing can be computed now."""
        work: list[tuple[Sequence, int]] = []
        budget = self._shape.max_tokens
        for sequence in list(self._running.values()):
            if sequence.sequence_id not in self._running:
                continue  # preempted for one before it
            tokens = min(sequence.length - sequence.computed, budget)
            if tokens and self._make_room(sequence, tokens):
                work.append((sequence, tokens))
                budget -= tokens
        work = [(s, tokens) for s, tokens in work if s.sequence_id in self._running]
        while budget and self._waiting and len(self._running) < self._shape.max_sequences:
            sequence = self._waiting[0]
            if not self._admit(sequence, budget):
                break
            self._waiting.popleft()
            if sequence.remote and not sequence.preempted:
                self._parked[sequence.sequence_id] = sequence
                self.reserved.append(sequence)
                continue
            self._running[sequence.sequence_id] = sequence
            tokens = min(sequence.length - sequence.computed, budget)
            sequence.scheduled_at = sequence.scheduled_at or now
            work.append((sequence, tokens))
            budget -= tokens
        if not work:
            return None
        for sequence, _ in work:
            sequence.scheduled_at = sequence.scheduled_at or now
        return Step(tuple(work), self._seconds(work))

    def finish(self, step: Step) -> list[Sequence]:
        """The step is over; returns the sequences that have one more token, ended ones included."""
        sampled = []
        for sequence, tokens in step.work:
            if self._running.get(sequence.sequence_id) is not sequence:
                continue  # aborted or preempted meanwhile
            sequence.computed += tokens
            if sequence.computed <= sequence.prompt:
                self._name_blocks(sequence)
            if sequence.computed == sequence.length:
                sequence.generated += 1
                sampled.append(sequence)
        return sampled

    def _seconds(self, work: Iterable[tuple[Sequence, int]]) -> float:
        chunks, batch, context = [], 0, 0
        for sequence, tokens in work:
            if tokens == 1 and sequence.decoding:
                batch += 1
                context += sequence.computed
            else:
                chunks.append((tokens, sequence.computed))
        return self._timing.step(chunks, batch, context)

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        """Finds its prefix and takes blocks for its first chunk, or for all of a handoff."""
        remote = sequence.remote and not sequence.preempted
        # At least one token is computed, and so is the block it is in.
        findable = (sequence.prompt - 1) // self._shape.block_size
        found = self.pool.match(sequence.names[:findable])
        held = len(found) * self._shape.block_size
        end = sequence.prompt if remote else min(sequence.length, held + budget)
        self.pool.hold(found)
        more = self.pool.allocate(-(-end // self._shape.block_size) - len(found))
        if more is None:
            self.pool.release(found)
            return False
        sequence.blocks = found + more
        sequence.computed = held
        if sequence.cached < 0:
            sequence.cached = held
        return True

    def _make_room(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for its next tokens, from whoever came last if need be; False: it went itself."""
        needed = -(-(sequence.computed + tokens) // self._shape.block_size) - len(sequence.blocks)
        while needed > 0:
            blocks = self.pool.allocate(needed)
            if blocks is not None:
                sequence.blocks += blocks
                break
            last = next(reversed(self._running.values()))
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.sequence_id]
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        sequence.preempted += 1
        self._waiting.appendleft(sequence)

    def _name_blocks(self, sequence: Sequence) -> None:
        full = sequence.computed // self._shape.block_size
        for block, name in zip(sequence.blocks[:full], sequence.names, strict=False):
            self.pool.fill(block, name)
