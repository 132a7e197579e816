"""The workers as placement sees them: columns of numbers, a row each, kept as requests come and go.

Pure: whoever puts a sequence on a worker says so with `take`, `answered` and `release`. A row is a
worker's slot for one life; a new life gets a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.bounds import Bounds
from router.breaker import Breaker
from router.held import HeldTokens
from router.output import Stage
from router.placement import Target, WorkerView
from router.prefix_index import PrefixIndex
from router.share import Share
from router.speeds import Speeds

RATE_SECONDS = 10.0
"""Time constant of the share of time that a worker spends on prompts."""

IDLE_SECONDS = 1.0
"""A worker counts as having been idle for so long before it was seen first."""

EJECTED = 1e6
"""Cost of a worker that failed many; taken only where there is no other."""

MAX_BUSY = 0.95

FIRST_OUTPUT_TOKENS = 256.0
"""What a completion is expected to take before any has been seen."""

_FLOATS = (
    "backlog", "queue", "progress_at", "work", "work_at", "decodes", "context", "kv_used",
    "kv_tokens", "incoming", "penalty", "pace", "slower", "drag", "since", "lumps",
    "strictest",
)  # fmt: skip


class Fleet:
    """Rows of workers. Every column is an array over slots; `size` of them are in use.

    Args:
        prefix_blocks: that `index`, of what their prefix caches hold, can keep.

    Columns:
        backlog: predicted seconds of prefill work that has no first token yet; `queue`: how many.
        progress_at: when the last of them ended, or the first began.
        work, work_at: seconds of prompts over RATE_SECONDS, fading, as of when; lumps: their
            squares; since: when that began to be counted.
        decodes: sequences that decode or are about to; `context`: their tokens.
        kv_used: tokens that all sequences there are expected to hold; kv_tokens: what fits.
        incoming: handoffs under way.
        penalty: added to the cost, large while it is ejected.
        pace: seconds of a decode step with one sequence more; slower: what one more again adds;
            drag: that, for all who decode there together.
        strictest: target per token among those who decode there; infinite if none does.
    """

    backlog: NDArray[np.float64]
    queue: NDArray[np.float64]
    progress_at: NDArray[np.float64]
    work: NDArray[np.float64]
    work_at: NDArray[np.float64]
    decodes: NDArray[np.float64]
    context: NDArray[np.float64]
    kv_used: NDArray[np.float64]
    kv_tokens: NDArray[np.float64]
    incoming: NDArray[np.float64]
    penalty: NDArray[np.float64]
    pace: NDArray[np.float64]
    slower: NDArray[np.float64]
    drag: NDArray[np.float64]
    since: NDArray[np.float64]
    lumps: NDArray[np.float64]
    strictest: NDArray[np.float64]

    def __init__(self, prefix_blocks: int = 10_000) -> None:
        self.index = PrefixIndex(prefix_blocks)
        self._held = HeldTokens(self.index)
        self.size = 0
        self.views: list[WorkerView | None] = []
        self._free: list[int] = []
        for name in _FLOATS:
            setattr(self, name, np.zeros(0))
        self._bounds: dict[int, Bounds] = {}
        self.speeds = Speeds()
        self.output_tokens: dict[str, float] = {}
        self.breakers: dict[str, Breaker] = {}
        self.penalised = False
        """Some worker's cost is raised."""
        self.version = 0
        """Changes when a worker comes, goes or changes what it is."""

    def join(self, view: WorkerView) -> int:
        """A new life; returns its slot."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.size = max(self.size, slot + 1)
        for name in _FLOATS:
            getattr(self, name)[slot] = 0.0
        self.since[slot] = self.strictest[slot] = np.inf
        self._bounds[slot] = Bounds()
        self.speeds.join(slot, self._of_model(view.model))
        self._repace(slot)
        self.breakers.setdefault(view.model, Breaker()).join(slot)
        self.update(slot, view)
        return slot

    def update(self, slot: int, view: WorkerView) -> None:
        """It became ready, lost its connection, changed its role."""
        before, self.views[slot] = self.views[slot], view
        if before is not None and before.role != view.role:
            self._change_role(slot, view.model)
        self.kv_tokens[slot] = view.kv_tokens or np.inf
        self.version += 1

    def _change_role(self, slot: int, model: str) -> None:
        """What its former role made of its time says nothing of the new one."""
        self.work[slot] = self.lumps[slot] = 0.0
        self.since[slot] = np.inf
        self.speeds.change_role(slot, self._of_model(model))
        self._repace(slot)

    def _of_model(self, model: str) -> list[int]:
        return [i for i, v in enumerate(self.views) if v is not None and v.model == model]

    def leave(self, slot: int) -> None:
        if (view := self.views[slot]) is not None:
            self.breakers[view.model].leave(slot)
        self.views[slot] = None
        self._penalise(slot, 0.0)
        self.index.forget(slot)
        self._free.append(slot)
        self.version += 1

    def slot_of(self, target: Target) -> int:
        """-1 if it is not here."""
        for slot, view in enumerate(self.views):
            if view is not None and view.target == target:
                return slot
        return -1

    def take(self, now: float, share: Share) -> None:
        """A sequence was put on its worker."""
        slot = share.slot
        breaker = self._breaker(slot)
        if breaker is not None and breaker.ejected(slot):
            breaker.started(now, slot)
            self._penalise(slot, EJECTED)
        if share.stage is not Stage.DECODE:
            if not self.queue[slot]:
                self.progress_at[slot] = now
            self.backlog[slot] += share.seconds
            self.queue[slot] += 1
            age = now - self.work_at[slot]
            fade = math.exp(-age / RATE_SECONDS)
            self.work[slot] = self.work[slot] * fade + share.seconds / RATE_SECONDS
            self.lumps[slot] = self.lumps[slot] * fade + share.seconds**2 / RATE_SECONDS
            self.work_at[slot] = now
        if share.stage is Stage.PREFILL:
            self.kv_used[slot] += share.prompt
            return
        if share.stage is Stage.DECODE:
            self.incoming[slot] += 1
        share.batch = float(self.decodes[slot])
        self.decodes[slot] += 1
        self._bounds[slot].add(share.tpot)
        self.strictest[slot] = self._bounds[slot].strictest
        self.context[slot] += share.prompt + share.output / 2
        self.kv_used[slot] += share.prompt + share.output
        self._repace(slot)

    def answered(self, now: float, share: Share) -> None:
        """Its first token has come from there."""
        if not share.answered:
            self._dequeue(now, share)
            if (breaker := self._breaker(share.slot)) and breaker.succeeded(share.slot):
                self._penalise(share.slot, 0.0)

    def failed(self, now: float, slot: int, shared: bool) -> None:
        """A sequence failed there; as `Breaker.failed`."""
        if (breaker := self._breaker(slot)) and breaker.failed(now, slot, shared):
            self._penalise(slot, EJECTED)

    def tick(self, now: float) -> None:
        """What time alone changes: one sequence may try each ejected worker whose rest is over, and
        what is known of workers that have had nothing to do grows old."""
        for breaker in self.breakers.values():
            for slot in breaker.due(now):
                self._penalise(slot, 0.0)
        for slot in self.speeds.fade(now, self.views):
            self._repace(slot)

    def ejected(self, slot: int) -> bool:
        """It failed of late, and is left alone."""
        breaker = self._breaker(slot)
        return breaker is not None and breaker.ejected(slot)

    def _breaker(self, slot: int) -> Breaker | None:
        view = self.views[slot]
        return None if view is None else self.breakers[view.model]

    def _dequeue(self, now: float, share: Share) -> None:
        share.answered = True
        slot = share.slot
        if share.stage is Stage.DECODE:
            self.incoming[slot] -= 1
            return
        self.queue[slot] -= 1
        left = self.backlog[slot] - share.seconds
        self.backlog[slot] = left if self.queue[slot] and left > 0 else 0.0
        self.progress_at[slot] = now

    def release(self, now: float, share: Share) -> None:
        """It has ended there."""
        if not share.answered:
            self._dequeue(now, share)
        slot = share.slot
        if share.stage is Stage.PREFILL:
            self.kv_used[slot] -= share.prompt
            return
        self.decodes[slot] -= 1
        self._bounds[slot].remove(share.tpot)
        self.strictest[slot] = self._bounds[slot].strictest
        self.context[slot] -= share.prompt + share.output / 2
        self.kv_used[slot] -= share.prompt + share.output
        self._repace(slot)

    def saw_prefill(self, slot: int, uncached: int, seconds: float) -> None:
        """Computing so many prompt tokens took so long."""
        self.speeds.prefill.observe(slot, uncached, seconds)

    def saw_step(self, slot: int, batch: float, seconds: float) -> None:
        """Tokens came at this pace in a batch of this size."""
        self.speeds.step.observe(slot, batch, seconds)
        self._repace(slot)

    def saw_exposed(self, slot: int, moved: int, seconds: float) -> None:
        """Of moving so many tokens' KV to it, so much was not hidden."""
        self.speeds.exposed.observe(slot, max(1, moved), max(seconds, 1e-5))

    def _repace(self, slot: int) -> None:
        batch = self.decodes[slot]
        self.pace[slot] = self.speeds.step.one(batch + 1.0, slot)
        self.slower[slot] = max(0.0, self.speeds.step.one(batch + 2.0, slot) - self.pace[slot])
        self.drag[slot] = batch * self.slower[slot]

    def busy_of(self, now: float, slot: int) -> float:
        """The share of time that a worker spends on prompts, as of late."""
        since = self.since[slot] = min(self.since.item(slot), now - IDLE_SECONDS)
        fading = math.exp((self.work_at.item(slot) - now) / RATE_SECONDS)
        weight = fading / -math.expm1((since - now) / RATE_SECONDS)
        return min(self.work.item(slot) * weight, MAX_BUSY)

    def load(self, now: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As `busy_of`, of each worker, and seconds² of prompts a second: the variance of the work
        that comes in a second, if prompts come at random (Campbell's theorem).

        A fading sum has seen only 1 − exp(−t / RATE_SECONDS) of what comes, t after it began.
        """
        rows = slice(0, self.size)
        since = self.since[rows]
        np.minimum(since, now - IDLE_SECONDS, out=since)
        weight = np.exp((self.work_at[rows] - now) / RATE_SECONDS)
        weight /= -np.expm1((since - now) / RATE_SECONDS)
        return np.minimum(self.work[rows] * weight, MAX_BUSY), self.lumps[rows] * weight

    def _penalise(self, slot: int, penalty: float) -> None:
        self.penalty[slot] = penalty
        self.penalised = bool(self.penalty.any())

    def held_tokens(self, token_ids: Sequence[int], model: str, salt: str) -> dict[int, int]:
        """How many of a prompt's tokens the workers' prefix caches hold, by slot."""
        self._held.see(self.version, self.views)
        return self._held.of(token_ids, model, salt)

    def expected_output(self, model: str, max_tokens: int) -> float:
        """Tokens that a completion will take, as those before it did."""
        return min(float(max_tokens), self.output_tokens.get(model, FIRST_OUTPUT_TOKENS))

    def saw_output(self, model: str, tokens: int) -> None:
        mean = self.output_tokens.setdefault(model, float(tokens))
        self.output_tokens[model] = mean + 0.02 * (tokens - mean)

    def _grow(self) -> None:
        old, new = len(self.views), max(16, 2 * len(self.views))
        for name in _FLOATS:
            column = np.zeros(new)
            column[:old] = getattr(self, name)
            setattr(self, name, column)
        self.speeds.resize(new)
        self.views += [None] * (new - old)
        self._free = list(range(new - 1, old - 1, -1))
