"""How others choose workers: turns, load, prefixes, chance. They split every request."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

from router.fleet import Fleet
from router.placement import Candidate, Decision, Demand, Placement, Plan

Choice = Callable[[Demand, list[int], list[int]], tuple[int, int]]


class Pair:
    """A policy that gives every request a prefill and a decode worker."""

    def __init__(self, fleet: Fleet, choose: Choice) -> None:
        self._fleet = fleet
        self._choose = choose

    def place(self, now: float, demand: Demand) -> Decision:
        views = {i: v for i, v in enumerate(self._fleet.views) if v is not None}
        prefills = [i for i, v in views.items() if v.role == "prefill"]
        decodes = [i for i, v in views.items() if v.role == "decode"]
        p, d = self._choose(demand, prefills, decodes)
        plan = Plan(prefill=views[p].target, decode=views[d].target)
        left = demand.prompt_tokens - demand.held.get(p, 0)
        seconds = self._fleet.speeds.prefill.one(left, p)
        return Decision(Candidate(plan, (p, d), 0.0, 0.0, left, seconds, 0.0), ())


def policies(fleet: Fleet, rng: random.Random) -> dict[str, Placement]:
    turns = count()

    def in_turn(demand: Demand, prefills: list[int], decodes: list[int]) -> tuple[int, int]:
        turn = next(turns)
        return prefills[turn % len(prefills)], decodes[turn % len(decodes)]

    def by_load(demand: Demand, prefills: list[int], decodes: list[int]) -> tuple[int, int]:
        return (
            min(prefills, key=lambda i: (fleet.backlog[i], rng.random())),
            min(decodes, key=lambda i: (fleet.decodes[i], rng.random())),
        )

    def by_prefix(demand: Demand, prefills: list[int], decodes: list[int]) -> tuple[int, int]:
        def rank(i: int) -> tuple[int, float]:
            return -demand.held.get(i, 0), rng.random()

        return min(prefills, key=rank), min(decodes, key=rank)

    def by_chance(demand: Demand, prefills: list[int], decodes: list[int]) -> tuple[int, int]:
        return rng.choice(prefills), rng.choice(decodes)

    chosen = {
        "round-robin": in_turn,
        "least-loaded": by_load,
        "prefix-only": by_prefix,
        "random": by_chance,
    }
    return {name: Pair(fleet, choose) for name, choose in chosen.items()}
