"""Placement's quality: traces replayed on a virtual clock through production's placement core and
the simulated engine's scheduler, against round-robin, least-loaded, prefix-only and random.

    .venv/bin/python -m bench.placement [--traces DIR] [--json]

Load is the share of the rate at which the pool that is full first (prefill by the trace's mean
prompt, decode by the batch that just meets the target) would always be busy, with cold caches.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.replay.policies import policies
from bench.replay.traces import TRACES, Arrival, Trace, at_rate
from bench.replay.world import SHAPE, TIMING, Clock, Served, Worker, World
from router.fleet import Fleet
from router.joint import JointPlacement
from router.learn import Observed, learn, shares_of
from router.output import Stage
from router.placement import Decision, Demand, Placement, Target, WorkerView

LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
POLICIES = ("pdserve", "round-robin", "least-loaded", "prefix-only", "random")
WARM_UP = 0.15
"""Of the requests, that are not counted."""


@dataclass(frozen=True)
class Row:
    """What came of a trace at a load."""

    trace: str
    load: float
    policy: str
    ttft_p90_s: float
    attainment: float
    prefix_hits: float
    whole: float

    def text(self) -> str:
        return (
            f"{self.trace:11} {100 * self.load:3.0f} % {self.policy:12} TTFT p90 "
            f"{self.ttft_p90_s:7.3f} s  attained {100 * self.attainment:5.1f} %  hits "
            f"{100 * self.prefix_hits:4.1f} %  whole {100 * self.whole:3.0f} %"
        )


def capacity(trace: Trace, arrivals: list[Arrival]) -> float:
    """Requests per second at which a pool is busy all the time."""
    prefills, decodes = trace.pools
    prompts = [TIMING.prefill(a.prompt, 0, SHAPE.max_tokens) for a in arrivals]
    output = sum(a.output for a in arrivals) / len(arrivals)
    context = sum(a.prompt + a.output / 2 for a in arrivals) / len(arrivals)
    batch = 1
    while batch < SHAPE.max_sequences and TIMING.step((), batch, int(batch * context)) < trace.tpot:
        batch += 1
    step = TIMING.step((), batch, int(batch * context))
    fits = SHAPE.num_blocks * SHAPE.block_size / (context + output / 2)
    batch = min(batch, int(fits))
    return min(prefills * len(arrivals) / sum(prompts), decodes * batch / step / output)


class Replay:
    """One trace at one load under one policy."""

    def __init__(self, trace: Trace, arrivals: list[Arrival], policy: str, seed: int) -> None:
        self._trace = trace
        self._clock = Clock()
        self._fleet = Fleet(200_000)
        views = [
            WorkerView(Target(f"{role}-{i}", "x"), "m", role, True, True, "l", 512, 600_000)
            for role, size in zip(("prefill", "decode"), trace.pools, strict=True)
            for i in range(size)
        ]
        slots = [self._fleet.join(view) for view in views]
        workers = {slot: Worker(self._clock, slot, self._fleet) for slot in slots}
        self._world = World(self._clock, [workers[i] for i in sorted(workers)])
        rng = random.Random(seed)
        ours: Placement = JointPlacement(self._fleet, "auto", rng)
        self._placement = {"pdserve": ours, **policies(self._fleet, rng)}[policy]
        self.served: list[Served] = []
        self.whole = 0
        for i, arrival in enumerate(arrivals):
            self._clock.after(arrival.at, lambda i=i, a=arrival: self._arrive(i, a))  # type: ignore[misc]

    def run(self) -> None:
        self._clock.run()

    def _arrive(self, number: int, arrival: Arrival) -> None:
        fleet, now = self._fleet, self._clock.now
        depths = fleet.index.held(arrival.names) if len(arrival.names) else {}
        held = {slot: depth * SHAPE.block_size for slot, depth in depths.items()}
        demand = Demand(
            "m", arrival.prompt, 4096, True, self._trace.ttft, self._trace.tpot, 0.0, held
        )
        decision = self._placement.place(now, demand)
        assert isinstance(decision, Decision)
        chosen = decision.chosen
        shares = shares_of(chosen, arrival.prompt, fleet.expected_output("m", 4096))
        for share in shares.values():
            fleet.take(now, share)
        served = Served(str(number), arrival)
        self.served.append(served)

        def first() -> None:
            fleet.answered(self._clock.now, next(iter(shares.values())))
            if Stage.PREFILL in shares:
                fleet.release(self._clock.now, shares[Stage.PREFILL])

        def end() -> None:
            seen = Observed(
                arrival.prompt,
                max(1, arrival.prompt - served.cached),
                served.first_at - served.started_at,
                served.tokens,
                served.last_at - served.second_at,
                served.moved,
                served.exposed if Stage.DECODE in shares else None,
            )
            learn(fleet, self._clock.now, "m", chosen, shares, seen)
            for share in shares.values():
                if share.stage is not Stage.PREFILL:
                    fleet.release(self._clock.now, share)

        served.on_first, served.on_end = first, end
        if chosen.plan.whole is not None:
            self.whole += 1
            self._world.whole(served, chosen.slots[0])
        else:
            self._world.split(served, *chosen.slots)


def measure(trace: Trace, arrivals: list[Arrival], load: float, policy: str, seed: int) -> Row:
    replay = Replay(trace, arrivals, policy, seed)
    replay.run()
    counted = replay.served[int(WARM_UP * len(replay.served)) :]
    assert all(s.tokens == s.arrival.output for s in counted)
    ttfts = sorted(s.first_at - s.arrival.at for s in counted)
    tpots = [(s.last_at - s.first_at) / (s.tokens - 1) for s in counted]
    attained = [
        s.first_at - s.arrival.at <= trace.ttft and tpot <= trace.tpot
        for s, tpot in zip(counted, tpots, strict=True)
    ]
    prompts = sum(s.arrival.prompt for s in counted)
    return Row(
        trace.name,
        load,
        policy,
        round(ttfts[int(0.9 * len(ttfts))], 4),
        round(sum(attained) / len(attained), 4),
        round(sum(s.cached for s in counted) / prompts, 4),
        round(replay.whole / len(replay.served), 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--only", nargs="+", default=[t.name for t in TRACES])
    parser.add_argument("--loads", nargs="+", type=float, default=list(LOADS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for trace in TRACES:
        if trace.name in arguments.only:
            arrivals = trace.read(arguments.traces / trace.file, trace.count)
            full = capacity(trace, arrivals)
            for load in arguments.loads:
                paced = at_rate(arrivals, load * full)
                for policy in POLICIES:
                    rows.append(measure(trace, paced, load, policy, seed=7))
                    print(rows[-1].text(), flush=True)
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
