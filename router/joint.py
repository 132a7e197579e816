"""Joint placement: prefill and decode together, or one worker whole, by predicted cost. Pure.

What a sequence costs on a worker is counted in shares of its targets, its own and those it takes
from its neighbours there:

    prefill on p    (wait_p + prefill_p(uncached)) / TTFT       its own wait for the first token
                  + prefill_p(uncached) · ρ_p/(1 − ρ_p) / TTFT  what those after it wait more
    decode on d     step_d(batch + 1)/(1 − ρ_d) / TPOT          its own pace, beside prompts on d
                  + (exposed handoff + wait for KV)/n / TPOT    the gap after its first token
                  + batch · (step_d(batch + 1) − step_d(batch)) / TPOT   its neighbours' pace
    whole on w      both, without the handoff, and
                  + batch · prefill_w(uncached)/n / TPOT        its neighbours stand still meanwhile

ρ is the share of time that a worker spends on prompts, n the tokens that completions take; all
speeds are learned per worker. A target that is predicted to be missed costs MISS more. The cost of
a pair is the sum of its sides, so the best pair of a layout is found without looking at every pair.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from router.curves import Floats
from router.fleet import Fleet
from router.placement import Candidate, Decision, Demand, Mode, Plan, Unplaced, WorkerView, missing

MISS = 2.0
"""Of a missed target, in targets."""

NEAR = 0.001
"""Costs this close, plus as large a share of them, are taken for equal: random among those."""

AVOIDED = 1e3
"""Cost of a worker that failed this sequence."""

BUSY_SECONDS = 0.05
"""So old may the workers' shares of time be."""

BURSTS = 1.6
"""Prompts come in bursts: so much more than on average they may slow a decode beside them."""

TPOT_HEADROOM = 0.75
"""Of the target: a pace counts as missed from there on, because those who come later slow it."""

CHUNK_TOKENS = 2048.0
"""Of a prompt per engine step, about."""


_LIMITS = np.array([[1.0], [TPOT_HEADROOM], [TPOT_HEADROOM]])


@dataclass(frozen=True)
class _Pools:
    """Who may do what for a model, as costs: 0 for those who may, infinity for the rest.

    Attributes:
        pairs: (prefill, decode) by KV layout.
        by_id: slots.
        missing: why nobody can.
    """

    version: int
    pairs: list[tuple[Floats, Floats]]
    prefill: Floats
    whole: Floats
    by_id: dict[str, int]
    missing: str


class _Costs(NamedTuple):
    """Of every slot, for one demand."""

    ttft: Floats
    uncached: Floats
    work: Floats
    prefill: Floats
    split_tpot: Floats
    decode: Floats
    whole_tpot: Floats
    whole: Floats


class JointPlacement:
    """The cheapest way to serve a sequence.

    Args:
        mode: auto weighs a handoff against one worker; always and never do not.
        rng: breaks ties, so that routers that see the same do not all choose the same.
    """

    def __init__(self, fleet: Fleet, mode: Mode, rng: random.Random) -> None:
        self._fleet = fleet
        self._mode = mode
        self._rng = rng
        self._pools: dict[str, _Pools] = {}
        self._busy = self._crowding = np.zeros(0)
        self._busy_at = 0.0

    def place(self, now: float, demand: Demand) -> Decision | Unplaced:
        """Decides from the fleet as it is; changes nothing."""
        pools = self._pools.get(demand.model)
        if pools is None or pools.version != self._fleet.version:
            pools = self._pools[demand.model] = self._pools_of(demand.model)
        if pools.missing:
            return Unplaced(pools.missing)
        costs = self._costs(now, demand, pools.by_id)
        candidates = self._candidates(demand, pools, costs)
        if not candidates:
            return Unplaced(missing(demand.model, self._views(), "always"))
        best = min(candidates, key=lambda candidate: candidate.cost)
        limit = best.cost + NEAR * (1 + best.cost)
        split = best.plan.whole is None
        near = [c for c in candidates if c.cost <= limit and (c.plan.whole is None) == split]
        chosen = near[0] if len(near) == 1 else self._rng.choice(near)
        losers = sorted((c for c in candidates if c is not chosen), key=lambda c: c.cost)
        return Decision(chosen, tuple(losers))

    def _costs(self, now: float, demand: Demand, by_id: dict[str, int]) -> _Costs:
        """A few dozen passes over short arrays: their number is what placement takes."""
        fleet, n = self._fleet, self._fleet.size
        rows = slice(0, n)
        prompt = demand.prompt_tokens
        per_ttft = 1.0 / max(1e-3, demand.ttft_seconds - demand.waited_seconds)
        per_tpot = 1.0 / demand.tpot_seconds
        output = max(2.0, fleet.expected_output(demand.model, demand.max_tokens))
        if not 0 <= now - self._busy_at < BUSY_SECONDS or len(self._busy) != n:
            self._busy, self._busy_at = fleet.busy(now), now
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

        targets = np.empty((3, n))
        targets[0] = (ttft + kv_wait) * per_ttft
        targets[1] = (pace + crowded * BURSTS) * per_tpot
        targets[2] = targets[1] + gap * (per_tpot / output)
        split_tpot = pace + gap * (1.0 / output)
        targets += MISS * (targets > _LIMITS)
        harm = fleet.drag[rows] * per_tpot
        prefill = targets[0] + work * self._crowding * per_ttft
        decode = targets[2] + harm
        if fleet.penalised or demand.avoid:
            penalty = self._penalty(demand, by_id)
            prefill += penalty
            decode += penalty
        stall = work * fleet.decodes[rows] * (per_tpot / output)
        whole = prefill + targets[1] + harm + stall
        return _Costs(ttft, uncached, work, prefill, split_tpot, decode, pace, whole)

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

    def _candidates(self, demand: Demand, pools: _Pools, costs: _Costs) -> list[Candidate]:
        found: list[Candidate] = []
        if not demand.decodes:
            for slot in self._best(costs.prefill + pools.prefill):
                found.append(self._alone(slot, costs))
            if found or self._mode == "always":
                return found
        if demand.decodes and self._mode != "never":
            for prefill, decode in pools.pairs:
                prefills = self._best(costs.prefill + prefill)
                decodes = self._best(costs.decode + decode)
                found += [self._pair(p, d, costs) for p in prefills for d in decodes if p != d]
        if self._mode != "always" or not found:
            found += [self._whole(slot, costs) for slot in self._best(costs.whole + pools.whole)]
        return found

    def _best(self, costs: Floats) -> list[int]:
        """The cheapest slot, or any of its near-equals, and one more."""
        first = int(costs.argmin())
        lowest = costs[first]
        if lowest == np.inf:
            return []
        close = costs <= lowest + NEAR * (1 + lowest) / 2
        near: list[int] = close.nonzero()[0].tolist()
        if len(near) > 2:
            return self._rng.sample(near, 2)
        if len(near) == 1:
            costs[first] = np.inf
            second = int(costs.argmin())
            if costs[second] < np.inf:
                near.append(second)
        return near

    def _pair(self, p: int, d: int, costs: _Costs) -> Candidate:
        views = self._fleet.views
        return Candidate(
            Plan(prefill=views[p].target, decode=views[d].target),  # type: ignore[union-attr]
            (p, d),
            float(costs.ttft[p]),
            float(costs.split_tpot[d]),
            int(costs.uncached[p]),
            float(costs.work[p]),
            float(costs.prefill[p] + costs.decode[d]),
        )

    def _alone(self, p: int, costs: _Costs) -> Candidate:
        target = self._fleet.views[p].target  # type: ignore[union-attr]
        return Candidate(
            Plan(prefill=target), (p, -1), float(costs.ttft[p]), 0.0, int(costs.uncached[p]),
            float(costs.work[p]), float(costs.prefill[p]),
        )  # fmt: skip

    def _whole(self, w: int, costs: _Costs) -> Candidate:
        target = self._fleet.views[w].target  # type: ignore[union-attr]
        return Candidate(
            Plan(whole=target), (w, w), float(costs.ttft[w]), float(costs.whole_tpot[w]),
            int(costs.uncached[w]), float(costs.work[w]), float(costs.whole[w]),
        )  # fmt: skip

    def _views(self) -> list[WorkerView]:
        return [view for view in self._fleet.views if view is not None]

    def _pools_of(self, model: str) -> _Pools:
        size = self._fleet.size
        prefill, whole = np.full(size, np.inf), np.full(size, np.inf)
        pairs: dict[str, tuple[Floats, Floats]] = {}
        by_id: dict[str, int] = {}
        for slot, view in enumerate(self._fleet.views[:size]):
            if view is None or view.model != model or not view.ready or not view.connected:
                continue
            by_id[view.target.worker_id] = slot
            if view.layout not in pairs:
                pairs[view.layout] = np.full(size, np.inf), np.full(size, np.inf)
            if view.serves(model, "prefill"):
                prefill[slot] = pairs[view.layout][0][slot] = 0.0
            if view.serves(model, "decode"):
                pairs[view.layout][1][slot] = 0.0
            if self._mode != "always" or view.role == "both":
                whole[slot] = 0.0
        lacking = "" if by_id else missing(model, self._views(), self._mode)
        return _Pools(self._fleet.version, list(pairs.values()), prefill, whole, by_id, lacking)
