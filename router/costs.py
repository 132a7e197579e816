"""What a sequence would cost on every worker: `router.joint` has the formula. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from router.curves import Floats
from router.fleet import Fleet
from router.placement import Demand

MISS = 2.0
"""Of a missed target, in targets."""

AVOIDED = 1e3
"""Cost of a worker that failed this sequence."""

BUSY_SECONDS = 0.05
"""So old may the workers' shares of time be."""

BURSTS = 1.6
"""Prompts come in bursts: so much more than on average they may slow a decode beside them."""

TPOT_HEADROOM = 0.75
"""Of the target: a pace counts as missed from there on, because those who come later slow it."""

UNSURE = 0.05
"""Of the time that an output may take: by so much its prediction is off."""

LOGISTIC = 1.702
"""1 / (1 + exp(−1.702 z)) is the normal distribution at z to 0.01 (Haley, 1952)."""

SURE = 30.0
"""Deviations; more are as many."""

CHUNK_TOKENS = 2048.0
"""Of a prompt per engine step, about."""

Column: TypeAlias = "Floats | list[float]"
"""A number per slot."""


@dataclass(frozen=True)
class Costs:
    """Of every slot, for one demand.

    Attributes:
        ttft: seconds to the first token from there.
        uncached: prompt tokens to compute; work: seconds of that.
        split_tpot, whole_tpot: seconds per token after a handoff to it, and without.
        prefill, decode, whole: what is compared.
    """

    ttft: Column
    uncached: Column
    work: Column
    prefill: Column
    split_tpot: Column
    decode: Column
    whole_tpot: Column
    whole: Column


class ColumnCosts:
    """A few dozen passes over short arrays: their number is what placement takes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._busy = self._lumps = self._crowding = np.zeros(0)
        self._busy_at = 0.0

    def of(self, now: float, demand: Demand, by_id: dict[str, int]) -> Costs:
        """From the fleet as it is; `by_id` are slots."""
        fleet, n = self._fleet, self._fleet.size
        rows = slice(0, n)
        prompt = demand.prompt_tokens
        per_ttft = 1.0 / max(1e-3, demand.ttft_seconds - demand.waited_seconds)
        per_tpot = 1.0 / demand.tpot_seconds
        output = max(2.0, fleet.expected_output(demand.model, demand.max_tokens))
        if not 0 <= now - self._busy_at < BUSY_SECONDS or len(self._busy) != n:
            (self._busy, self._lumps), self._busy_at = fleet.load(now), now
            self._crowding = self._busy / (1.0 - self._busy)
        uncached, work, moved = self._work(demand, n)

        backlog = fleet.backlog[rows]
        begun = np.minimum(now - fleet.progress_at[rows], backlog / (fleet.queue[rows] + 1e-9))
        # A prompt's steps carry the decodes of the same worker along.
        carried = fleet.drag[rows] * (uncached * (1.0 / CHUNK_TOKENS) + 1.0)
        ttft = np.maximum(backlog - begun, 0.0) + work + carried
        alone = fleet.pace[rows]
        crowded = alone * self._crowding
        pace = alone + crowded
        gap = moved * (fleet.incoming[rows] + 1.0)
        lacking = fleet.kv_used[rows] + (prompt + output - fleet.kv_tokens[rows])
        kv_wait: Floats | float = 0.0
        if lacking.max() > 0:
            share = np.maximum(lacking, 0.0) / (fleet.kv_used[rows] + 1.0)
            kv_wait = share * output * alone
            gap += kv_wait

        # Whole, and split: what the output may take, less what it will, in standard deviations.
        window = TPOT_HEADROOM * demand.tpot_seconds * output
        left = np.empty((2, n))
        left[0] = window * (1.0 - self._busy) - output * alone
        left[1] = left[0] - gap
        left /= np.sqrt(self._lumps * window + (UNSURE * window) ** 2)
        missed = MISS / (1.0 + np.exp(np.minimum(left, SURE) * LOGISTIC))
        split_tpot = pace + gap * (1.0 / output)
        of_ttft = (ttft + kv_wait) * per_ttft
        of_ttft += MISS * (of_ttft > 1.0)
        bursts = crowded * (BURSTS * per_tpot)
        harm = fleet.drag[rows] * per_tpot
        stricter = fleet.strictest[rows] < demand.tpot_seconds
        if stricter.any():
            harm += MISS * (stricter & (alone > TPOT_HEADROOM * fleet.strictest[rows]))
        prefill = of_ttft + work * self._crowding * per_ttft
        decode = split_tpot * per_tpot + bursts + missed[1] + harm
        if fleet.penalised or demand.avoid:
            penalty = self._penalty(demand, by_id)
            prefill += penalty
            decode += penalty
        stall = work * fleet.decodes[rows] * (per_tpot / output)
        whole = prefill + pace * per_tpot + bursts + missed[0] + harm + stall
        return Costs(ttft, uncached, work, prefill, split_tpot, decode, pace, whole)

    def _work(self, demand: Demand, n: int) -> tuple[Floats, Floats, Floats]:
        """Per slot: tokens to compute, seconds of that, and the exposed seconds of a handoff."""
        fleet, rows, prompt = self._fleet, slice(0, n), demand.prompt_tokens
        uncached = np.full(n, float(prompt))
        work, moved = fleet.speeds.prefill.at(prompt, rows), fleet.speeds.exposed.at(prompt, rows)
        if demand.held:
            slots = np.fromiter(demand.held, np.intp, len(demand.held))
            held = np.fromiter(demand.held.values(), np.float64, len(demand.held))
            left = np.maximum(prompt - held, 1.0)
            uncached[slots] = left
            work[slots] = fleet.speeds.prefill.each(left, slots)
            moved[slots] = fleet.speeds.exposed.each(left, slots)
        return uncached, work, moved

    def _penalty(self, demand: Demand, by_id: dict[str, int]) -> Floats:
        penalty: Floats = self._fleet.penalty[: self._fleet.size].copy()
        for worker_id in demand.avoid:
            if (slot := by_id.get(worker_id)) is not None:
                penalty[slot] += AVOIDED
        return penalty
