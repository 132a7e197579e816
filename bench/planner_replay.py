"""The planner against a static best ratio, two HPA-style scalers and a Dynamo-style formula.

    python -m bench.planner_replay TRACE… [--seconds 1000] [--compress 3] [--budget 16] [--seed 1]

A trace is played `compress` times as fast, for `seconds`, with a day's rise and fall laid over its
rate: thinned to a quarter at night, whole at noon. Everyone starts with the same two workers, sees
the same observations every 5 s and is obeyed in the same way; a cold start takes 30 s. Static is
chosen in hindsight: the fewest workers, in their best split, that reach the share; it is
there from the start. Prints a table: attainment, and GPU-seconds.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import replace
from pathlib import Path

from cluster.planner.actions import Wish, after, counted, plan_actions, serving
from cluster.planner.capacity import Load
from cluster.planner.demand import Demand, Lengths, RecentLengths
from cluster.planner.hardware import hardware
from cluster.planner.performance import Performance
from cluster.planner.planner import Planner
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.sizing import size_split
from cluster.planner.state import ClassTargets, Counts, Decision, Observed, Policy
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Targets, attainment
from cluster.simulator.planning import Controller, Decider
from cluster.simulator.traces import read_trace
from cluster.simulator.workload import Arrival
from cluster.simulator.world import World

INTERVAL = 5.0
COLD_START = 30.0
CHUNK = 1024


class Static:
    """Changes nothing."""

    def step(self, now: float, observed: Observed) -> Decision:
        have = counted(serving(observed.workers))
        return Decision(now, have, have)


class Scaler:
    """Two pools, each by its own metric, as two HorizontalPodAutoscalers do it.

    desired = ceil(now × metric ÷ target) outside a tolerance of 10 %, down only to the highest of
    the last 300 s.
    """

    def __init__(self, policy: Policy, world: World, prefill_at: float, decode_at: float) -> None:
        self._policy, self._world = policy, world
        self._at = {"prefill": prefill_at, "decode": decode_at}
        self._history: list[tuple[float, Counts]] = []

    def step(self, now: float, observed: Observed) -> Decision:
        have = counted(serving(observed.workers))
        living = self._world.fleet.living()
        metric: dict[str, float] = {
            "prefill": sum(w.queued_prompt_tokens for w in living),
            "decode": sum(w.running_sequences for w in living),
        }
        metric["prefill"] += observed.queued_prompt_tokens
        desired = {}
        for role, target in self._at.items():
            current = max(1, have.of(role))  # type: ignore[arg-type]
            ratio = metric[role] / current / target
            desired[role] = current if 0.9 <= ratio <= 1.1 else max(1, math.ceil(current * ratio))
        self._history.append((now, Counts(**desired)))
        recent = [c for at, c in self._history if at > now - 300]
        want = Counts(max(c.prefill for c in recent), max(c.decode for c in recent))
        return act(self._policy, now, observed, capped(want, self._policy))


class Formula:
    """Pools by mean throughput, as Dynamo's SLA planner has it: requests × tokens ÷ what one worker
    does at its target, with no regard to queues or tails."""

    def __init__(self, policy: Policy, worker: Performance, targets: ClassTargets) -> None:
        self._policy, self._worker, self._targets = policy, worker, targets
        self._lengths = RecentLengths()

    def step(self, now: float, observed: Observed) -> Decision:
        rate = 0.0
        for traffic in observed.traffic.values():
            rate += traffic.rate
            for each in traffic.lengths:
                self._lengths.observe(each)
        sample = self._lengths.sample()
        if not sample:
            return Static().step(now, observed)
        prompt = sum(each.prompt for each in sample) / len(sample)
        output = sum(each.output for each in sample) / len(sample)
        context = prompt + output / 2
        batch = 1
        while self._worker.decode_seconds(batch + 1, (batch + 1) * context) <= self._targets.tpot:
            batch += 1
        per_decode = batch / self._worker.decode_seconds(batch, batch * context)
        want = Counts(
            max(1, math.ceil(rate * self._worker.prefill_seconds(round(prompt)))),
            max(1, math.ceil(rate * output / per_decode)),
        )
        return act(self._policy, now, observed, capped(want, self._policy))


def capped(want: Counts, policy: Policy) -> Counts:
    """Within the budget, in the same proportion."""
    if want.total <= policy.max_workers:
        return want
    prefill = max(1, round(policy.max_workers * want.prefill / want.total))
    prefill = min(prefill, policy.max_workers - 1)
    return Counts(prefill, policy.max_workers - prefill)


def act(policy: Policy, now: float, observed: Observed, want: Counts) -> Decision:
    """Adds and removes; a scaler that knows one pool flips nothing."""
    keep = replace(want)
    actions = plan_actions(policy, observed.workers, Wish(want, Counts(99, 99, 99), keep))
    return Decision(now, after(observed.workers, actions), want, tuple(actions))


def day(arrivals: tuple[Arrival, ...], seconds: float, compress: float, seed: int) -> list[Arrival]:
    rng = random.Random(seed)
    kept = []
    for each in (replace(a, at=a.at / compress) for a in arrivals):
        if each.at >= seconds:
            break
        share = 0.25 + 0.75 * (0.5 - 0.5 * math.cos(2 * math.pi * each.at / seconds))
        if rng.random() < share:
            kept.append(each)
    return kept


def play(
    worker: Performance, start: Counts, arrivals: list[Arrival], decider: object, targets: Targets
) -> tuple[float, float]:
    world = World(
        Deployment(
            worker,
            start.prefill,
            start.decode,
            start.both,
            EngineLimits(max_tokens=CHUNK),
            cold_start=COLD_START,
            start_within=targets.ttft * 3,
        )
    )
    chosen: Decider = decider(world) if callable(decider) else decider  # type: ignore[assignment]
    Controller(world, chosen, INTERVAL)
    outcomes = world.run(arrivals)
    return attainment(outcomes, targets), world.fleet.gpu_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.planner_replay", description=__doc__)
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=1000.0)
    parser.add_argument("--compress", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1, help="of the thinning (1)")
    parser.add_argument("--gpu", default="L40S")
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--ttft", type=float, default=1.5)
    parser.add_argument("--tpot", type=float, default=0.06)
    asked = parser.parse_args()
    shape = load_shape("llama-3.1-8b")
    worker = roofline(shape, hardware(asked.gpu))
    targets, goal = Targets(asked.ttft, asked.tpot), ClassTargets(asked.ttft, asked.tpot)
    policy = Policy({"default": asked.budget}, cold_start=COLD_START, interval=INTERVAL)
    print("| trace | who | attainment | GPU-s | of static's |\n|---|---|---|---|---|")
    for path in asked.traces:
        arrivals = day(
            read_trace(path, shape.max_model_len).arrivals,
            asked.seconds,
            asked.compress,
            asked.seed,
        )
        sample = RecentLengths(4096)
        for each in arrivals:
            sample.observe(Lengths(each.prompt, each.output))
        best: tuple[float, float, Counts] | None = None
        peak = 1.3 * len(arrivals) / asked.seconds
        load = Load(worker, {"": Demand(peak, sample.sample())}, {"": goal}, CHUNK)
        near = size_split(load, asked.budget)
        base = near.counts.total if near else 2
        for total in range(max(2, base - 1), asked.budget + 1):
            middle = near.counts.prefill if near else 1
            options = [Counts(both=total)]
            options += [
                Counts(p, total - p) for p in range(max(1, middle - 1), min(total, middle + 2))
            ]
            runs = [(*play(worker, o, arrivals, Static(), targets), o) for o in options]
            best = max(runs, key=lambda run: run[0])
            if best[0] >= goal.share:
                break
        assert best is not None
        print_row(path, f"static {best[2]} (hindsight)", best[0], best[1], best[1])
        deciders: dict[str, object] = {
            "pdserve": Planner(policy, worker, {"": goal}, chunk=CHUNK),
            "two scalers, tight": lambda world: Scaler(policy, world, 2000, 12),
            "two scalers, loose": lambda world: Scaler(policy, world, 8000, 24),
            "formula": Formula(policy, worker, goal),
        }
        for who, decider in deciders.items():
            met, used = play(worker, Counts(1, 1), arrivals, decider, targets)
            print_row(path, who, met, used, best[1])


def print_row(path: Path, who: str, met: float, used: float, static: float) -> None:
    share = used / static
    print(f"| {path.stem} | {who} | {met:.1%} | {used:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
