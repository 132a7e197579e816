"""As `router.costs`, a worker at a time: where there are few, a pass of numpy's costs more than all
its numbers, most of all when the processor has done something else meanwhile. Pure."""

from __future__ import annotations

import math

from router.costs import (
    AVOIDED,
    BURSTS,
    BUSY_SECONDS,
    CHUNK_TOKENS,
    LOGISTIC,
    MISS,
    SURE,
    TPOT_HEADROOM,
    UNSURE,
    Costs,
)
from router.fleet import Fleet
from router.placement import Demand

FEW = 12
"""Slots, up to which it is the quicker way."""


class RowCosts:
    """Gives what `ColumnCosts` gives, in lists."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._busy: list[float] = []
        self._lumps: list[float] = []
        self._busy_at = 0.0

    def of(self, now: float, demand: Demand, by_id: dict[str, int]) -> Costs:
        """As `ColumnCosts.of`."""
        fleet, n, prompt = self._fleet, self._fleet.size, demand.prompt_tokens
        per_ttft = 1.0 / max(1e-3, demand.ttft_seconds - demand.waited_seconds)
        per_tpot = 1.0 / demand.tpot_seconds
        output = max(2.0, fleet.expected_output(demand.model, demand.max_tokens))
        if not 0 <= now - self._busy_at < BUSY_SECONDS or len(self._busy) != n:
            busy, lumps = fleet.load(now)
            self._busy, self._lumps, self._busy_at = busy.tolist(), lumps.tolist(), now
        backlogs, queues, progress, drags, paces, incoming, used, fits, decodes, stricts = (
            column[:n].tolist()
            for column in (
                fleet.backlog, fleet.queue, fleet.progress_at, fleet.drag, fleet.pace,
                fleet.incoming, fleet.kv_used, fleet.kv_tokens, fleet.decodes,
                fleet.strictest,
            )
        )  # fmt: skip
        lacking = [used[i] + (prompt + output - fits[i]) for i in range(n)]
        some_lack = max(lacking) > 0
        penalties = self._penalties(demand, by_id) if fleet.penalised or demand.avoid else None
        all_work = fleet.speeds.prefill.for_all(prompt, n)
        all_moved = fleet.speeds.exposed.for_all(prompt, n)
        window = TPOT_HEADROOM * demand.tpot_seconds * output
        unsure = (UNSURE * window) ** 2
        ttfts, uncacheds, works = [], [], []
        prefills, split_tpots, decodings, whole_tpots, wholes = [], [], [], [], []
        for i in range(n):
            uncached, work, moved = float(prompt), all_work[i], all_moved[i]
            if i in demand.held:
                uncached = max(prompt - demand.held[i], 1.0)
                work = fleet.speeds.prefill.one(uncached, i)
                moved = fleet.speeds.exposed.one(uncached, i)
            begun = min(now - progress[i], backlogs[i] / (queues[i] + 1e-9))
            # A prompt's steps carry the decodes of the same worker along.
            carried = drags[i] * (uncached * (1.0 / CHUNK_TOKENS) + 1.0)
            ttft = max(backlogs[i] - begun, 0.0) + work + carried
            crowding = self._busy[i] / (1.0 - self._busy[i])
            crowded = paces[i] * crowding
            pace = paces[i] + crowded
            gap = moved * (incoming[i] + 1.0)
            kv_wait = 0.0
            if some_lack:
                kv_wait = max(lacking[i], 0.0) / (used[i] + 1.0) * output * paces[i]
                gap += kv_wait
            of_ttft = (ttft + kv_wait) * per_ttft
            of_ttft += MISS * (of_ttft > 1.0)
            split_tpot = pace + gap * (1.0 / output)
            left = window * (1.0 - self._busy[i]) - output * paces[i]
            deviation = math.sqrt(self._lumps[i] * window + unsure)
            bursts = crowded * (BURSTS * per_tpot)
            of_tpot = pace * per_tpot + bursts + MISS * _risk(left / deviation)
            of_split = split_tpot * per_tpot + bursts + MISS * _risk((left - gap) / deviation)
            harm = drags[i] * per_tpot
            if stricts[i] < demand.tpot_seconds:
                harm += MISS * (paces[i] > TPOT_HEADROOM * stricts[i])
            prefill = of_ttft + work * crowding * per_ttft
            decode = of_split + harm
            if penalties is not None:
                prefill += penalties[i]
                decode += penalties[i]
            stall = work * decodes[i] * (per_tpot / output)
            ttfts.append(ttft)
            uncacheds.append(uncached)
            works.append(work)
            prefills.append(prefill)
            split_tpots.append(split_tpot)
            decodings.append(decode)
            whole_tpots.append(pace)
            wholes.append(prefill + of_tpot + harm + stall)
        return Costs(ttfts, uncacheds, works, prefills, split_tpots, decodings, whole_tpots, wholes)

    def _penalties(self, demand: Demand, by_id: dict[str, int]) -> list[float]:
        penalties: list[float] = self._fleet.penalty[: self._fleet.size].tolist()
        for worker_id in demand.avoid:
            if (slot := by_id.get(worker_id)) is not None:
                penalties[slot] += AVOIDED
        return penalties


def _risk(left: float) -> float:
    """That a target is missed which so many standard deviations are left to."""
    return 1.0 / (1.0 + math.exp(LOGISTIC * min(SURE, left)))
