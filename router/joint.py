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
speeds are learned per worker, and what prompts slow a decode counts 1 + BURSTS times. A TTFT that
is predicted to be missed costs MISS more, a TPOT MISS times the risk: that in the time n tokens may
take, on average ρ of it and at random, prompts take more than decoding leaves. Beside one with a
stricter TPOT, whatever makes that miss its target costs MISS. The cost of a pair is the sum of its
sides, so the best pair of a layout is found without looking at every pair.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from router.costs import Column, ColumnCosts, Costs
from router.curves import Floats
from router.fleet import Fleet
from router.placement import Candidate, Decision, Demand, Mode, Plan, Unplaced, WorkerView, missing
from router.row_costs import FEW, RowCosts

NEAR = 0.001
"""Costs this close, plus as large a share of them, are taken for equal: random among those."""


@dataclass(frozen=True)
class _Pools:
    """Who may do what for a model, as costs: 0 for those who may, infinity for the rest.

    Attributes:
        pairs: (prefill, decode) by KV layout.
        by_id: slots.
        missing: why nobody can.
    """

    version: int
    pairs: list[tuple[Column, Column]]
    prefill: Column
    whole: Column
    by_id: dict[str, int]
    missing: str


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
        self._by_column = ColumnCosts(fleet)
        self._by_row = RowCosts(fleet)

    def place(self, now: float, demand: Demand) -> Decision | Unplaced:
        """Decides from the fleet as it is; changes nothing."""
        pools = self._pools.get(demand.model)
        if pools is None or pools.version != self._fleet.version:
            pools = self._pools[demand.model] = self._pools_of(demand.model)
        if pools.missing:
            return Unplaced(pools.missing)
        by = self._by_row if self._fleet.size <= FEW else self._by_column
        costs = by.of(now, demand, pools.by_id)
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

    def _candidates(self, demand: Demand, pools: _Pools, costs: Costs) -> list[Candidate]:
        found: list[Candidate] = []
        if not demand.decodes:
            for slot in self._best(costs.prefill, pools.prefill):
                found.append(self._alone(slot, costs))
            if found or self._mode == "always":
                return found
        if demand.decodes and self._mode != "never":
            for prefill, decode in pools.pairs:
                prefills = self._best(costs.prefill, prefill)
                decodes = self._best(costs.decode, decode)
                found += [self._pair(p, d, costs) for p in prefills for d in decodes if p != d]
        if self._mode != "always" or not found:
            found += [self._whole(slot, costs) for slot in self._best(costs.whole, pools.whole)]
        return found

    def _best(self, costs: Column, allowed: Column) -> list[int]:
        """The cheapest slot, or any of its near-equals, and one more."""
        if isinstance(costs, list):
            return self._best_of_few([c + a for c, a in zip(costs, allowed, strict=True)])
        costs = costs + allowed
        first = int(costs.argmin())
        lowest = costs[first]
        if lowest == np.inf:
            return []
        near: list[int] = (costs <= _near(lowest)).nonzero()[0].tolist()
        if len(near) > 2:
            return self._rng.sample(near, 2)
        if len(near) == 1:
            costs[first] = np.inf
            second = int(costs.argmin())
            if costs[second] < np.inf:
                near.append(second)
        return near

    def _best_of_few(self, costs: list[float]) -> list[int]:
        lowest = min(costs)
        if lowest == math.inf:
            return []
        limit = _near(lowest)
        near = [slot for slot, cost in enumerate(costs) if cost <= limit]
        if len(near) > 2:
            return self._rng.sample(near, 2)
        if len(near) == 1:
            costs[near[0]] = math.inf
            second = min(costs)
            if second < math.inf:
                near.append(costs.index(second))
        return near

    def _pair(self, p: int, d: int, costs: Costs) -> Candidate:
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

    def _alone(self, p: int, costs: Costs) -> Candidate:
        target = self._fleet.views[p].target  # type: ignore[union-attr]
        return Candidate(
            Plan(prefill=target), (p, -1), float(costs.ttft[p]), 0.0, int(costs.uncached[p]),
            float(costs.work[p]), float(costs.prefill[p]),
        )  # fmt: skip

    def _whole(self, w: int, costs: Costs) -> Candidate:
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
        few = size <= FEW

        def column(costs: Floats) -> Column:
            return costs.tolist() if few else costs

        both = [(column(p), column(d)) for p, d in pairs.values()]
        return _Pools(self._fleet.version, both, column(prefill), column(whole), by_id, lacking)


def _near(lowest: float) -> float:
    """Up to here costs are near-equal to the lowest."""
    return lowest + NEAR * (1 + lowest) / 2
