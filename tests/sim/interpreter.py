"""Runs planner scenarios: plain text, one line a fact, an event or an expectation.

    gpu L40S                        what a worker runs on; the model is Llama-3.1-8B
    workers prefill=2 decode=2      at the start, ready
    policy budget=8 cold_start=30   fields of Policy; budget is in workers
    targets [CLASS] ttft=1 tpot=0.06 share=0.9
    at T traffic [CLASS] rate=5 prompt=1000 output=150 [until=U rate_to=20]
    at T fail ROLE|any | stuck on | blind on | nan on | clock S | hold ROLE N | release ROLE
    at T targets … | budget N
    end T
    expect attainment >= X from A to B      of the requests that arrive then, all classes
    expect workers <= N                     at every moment, starting and draining ones too
    expect ROLE >= N at T                   serving; also <=, and `any` for all roles together
    expect reversals <= N [from A to B]     changes of direction of a pool's target
    expect held TEXT from A to B            every decision changes nothing and says why
    expect shortfall METRIC from A to B     every decision says that it is out of reach
    expect reason TEXT from A to B          some decision gives this reason

A `#` begins a comment. Times are seconds.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.planner.hardware import hardware
from cluster.planner.planner import Planner
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.planner.state import ROLES, ClassTargets, Policy
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Outcome, Targets, attainment
from cluster.simulator.planning import Controller, Moment
from cluster.simulator.workload import Arrival, merged
from cluster.simulator.world import World

COMPARE = {">=": operator.ge, "<=": operator.le}


@dataclass
class Scenario:
    """A file, read."""

    gpu: str = "L40S"
    workers: dict[str, int] = field(default_factory=dict)
    policy: dict[str, float] = field(default_factory=dict)
    targets: dict[str, ClassTargets] = field(default_factory=dict)
    events: list[tuple[float, list[str]]] = field(default_factory=list)
    expects: list[list[str]] = field(default_factory=list)
    end: float = 0.0


@dataclass
class Played:
    """What happened."""

    outcomes: list[Outcome]
    moments: list[Moment]
    living: list[tuple[float, int]]


def read(path: Path) -> Scenario:
    scenario = Scenario()
    for line in path.read_text().splitlines():
        words = line.partition("#")[0].split()
        match words:
            case []:
                pass
            case ["gpu", name]:
                scenario.gpu = name
            case ["workers", *pairs]:
                scenario.workers = {k: int(v) for k, v in numbers(pairs).items()}
            case ["policy", *pairs]:
                scenario.policy = numbers(pairs)
            case ["targets", *rest]:
                scenario.targets |= class_targets(rest)
            case ["at", time, *event]:
                scenario.events.append((float(time), event))
            case ["end", time]:
                scenario.end = float(time)
            case ["expect", *what]:
                scenario.expects.append(what)
            case _:
                raise ValueError(f"{path.name}: {line!r} is not understood")
    return scenario


def numbers(pairs: list[str]) -> dict[str, float]:
    return {name: float(value) for name, _, value in (pair.partition("=") for pair in pairs)}


def class_targets(words: list[str]) -> dict[str, ClassTargets]:
    kind, pairs = ("", words) if "=" in words[0] else (words[0], words[1:])
    return {kind: ClassTargets(**numbers(pairs))}


def arrivals_of(scenario: Scenario) -> list[Arrival]:
    """Poisson arrivals; lengths are log-normal, as those of the Azure traces are."""
    streams: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for at, event in scenario.events:
        if event[0] == "traffic":
            kind, pairs = ("", event[1:]) if "=" in event[1] else (event[1], event[2:])
            streams.setdefault(kind, []).append((at, numbers(pairs)))
    return merged(*(list(stream(kind, spans, scenario.end)) for kind, spans in streams.items()))


def stream(kind: str, spans: list[tuple[float, dict[str, float]]], end: float) -> Iterator[Arrival]:
    rng = random.Random(f"{kind}/7")
    current: dict[str, float] = {}
    for (start, changes), (stop, _) in zip(spans, [*spans[1:], (end, {})], strict=True):
        current = {k: v for k, v in current.items() if k not in ("until", "rate_to")} | changes
        until, peak = current.get("until", stop), current.get("rate_to", current["rate"])
        highest = max(current["rate"], peak)
        at = start
        while highest > 0:
            at += rng.expovariate(highest)
            if at >= stop:
                break
            share = min(1.0, (at - start) / max(1e-9, until - start))
            if rng.random() * highest > current["rate"] + share * (peak - current["rate"]):
                continue
            prompt = min(8000, max(1, round(current["prompt"] * rng.lognormvariate(-0.18, 0.6))))
            output = min(2000, max(1, round(current["output"] * rng.lognormvariate(-0.25, 0.7))))
            yield Arrival(at, prompt, output, kind=kind)


def play(scenario: Scenario) -> Played:
    policy = Policy(
        budget={"default": int(scenario.policy.get("budget", 8))},
        **{k: v for k, v in scenario.policy.items() if k not in ("budget", "minimum", "max_step")},
        **{k: int(v) for k, v in scenario.policy.items() if k in ("minimum", "max_step")},
    )
    worker = roofline(load_shape("llama-3.1-8b"), hardware(scenario.gpu))
    world = World(
        Deployment(
            worker,
            **scenario.workers,
            limits=EngineLimits(max_tokens=1024),
            cold_start=policy.cold_start,
            timeout=300.0,
            ttft=min(t.ttft for t in scenario.targets.values()),
            tpot=min(t.tpot for t in scenario.targets.values()),
            start_within=max(t.ttft for t in scenario.targets.values()),
            pace_within=max(t.tpot for t in scenario.targets.values()),
        )
    )
    planner = Planner(policy, worker, scenario.targets, chunk=1024)
    arrivals = arrivals_of(scenario)
    kinds = tuple(sorted({a.kind for a in arrivals} | set(scenario.targets)))
    controller = Controller(world, planner, policy.interval, kinds)
    for at, event in scenario.events:
        if event[0] != "traffic":
            world.agenda.at(at, lambda event=event: happen(controller, planner, event))
    living: list[tuple[float, int]] = []

    def count() -> None:
        living.append((world.agenda.now, len(world.fleet.living())))
        world.agenda.after(1.0, count)

    world.agenda.at(0.5, count)
    outcomes = world.run(arrivals, until=scenario.end)
    while world.agenda.next_at <= scenario.end:
        world.agenda.step()
    return Played(outcomes, controller.moments, living)


def happen(controller: Controller, planner: Planner, event: list[str]) -> None:
    fleet, faults = controller.world.fleet, controller.faults
    match event:
        case ["fail", role]:
            ready = [w for w in fleet.living() if w.phase == "ready" and role in (w.role, "any")]
            fleet.fail(ready[0], restart_after=None)
        case ["stuck", switch]:
            faults.stuck_adds = switch == "on"
        case ["blind", switch]:
            faults.blind = switch == "on"
        case ["nan", switch]:
            faults.nan = switch == "on"
        case ["clock", seconds]:
            faults.clock_offset += float(seconds)
        case ["hold", role, workers] if role in ROLES:
            planner.hold(role, int(workers))
        case ["release", role] if role in ROLES:
            planner.release(role)
        case ["targets", *words]:
            planner.set_targets(class_targets(words))
        case ["budget", workers]:
            planner.set_policy(replace(planner.policy, budget={"default": int(workers)}))
        case _:
            raise ValueError(f"the event {event} is not understood")


def unmet(scenario: Scenario, played: Played) -> list[str]:
    """The expectations that did not hold, with what was there instead."""
    return [
        f"expected {' '.join(what)}, but {found}"
        for what in scenario.expects
        if (found := judge(scenario, played, what))
    ]


def judge(scenario: Scenario, played: Played, what: list[str]) -> str:
    """Empty if it holds."""
    words, (start, end) = span(what, scenario.end)
    moments = [m for m in played.moments if start <= m.at <= end]
    match words:
        case ["attainment", sign, share]:
            final = {k: Targets(t.ttft, t.tpot) for k, t in scenario.targets.items()}
            within = [o for o in played.outcomes if start <= o.at < end]
            met = attainment(within, {k: final.get(k, final.get("")) for k in kinds_of(within)})  # type: ignore[misc]
            return "" if COMPARE[sign](met, float(share)) else f"it was {met:.3f}"
        case ["workers", sign, number]:
            return first_bad(played.living, COMPARE[sign], int(number))
        case ["reversals", sign, number]:
            turned = reversals(moments)
            return "" if COMPARE[sign](turned, int(number)) else f"there were {turned}"
        case [role, sign, number, "at", time] if role in (*ROLES, "any"):
            moment = min(played.moments, key=lambda m: abs(m.at - float(time)))
            have = moment.serving.total if role == "any" else getattr(moment.serving, role)
            return "" if COMPARE[sign](have, int(number)) else f"there were {moment.serving}"
        case ["held", *text]:
            wrong = [m for m in moments if " ".join(text) not in m.decision.held]
            wrong += [m for m in moments if m.decision.actions]
            return f"at {wrong[0].at:g}: {wrong[0].decision.reasons}" if wrong else ""
        case ["shortfall", metric]:
            wrong = [m for m in moments if all(s.metric != metric for s in m.decision.shortfalls)]
            return f"at {wrong[0].at:g}: {wrong[0].decision.reasons}" if wrong else ""
        case ["reason", *text]:
            said = any(" ".join(text) in r for m in moments for r in m.decision.reasons)
            return "" if said else "no decision says so"
    raise ValueError(f"the expectation {what} is not understood")


def kinds_of(outcomes: list[Outcome]) -> set[str]:
    return {o.kind for o in outcomes}


def span(words: list[str], end: float) -> tuple[list[str], tuple[float, float]]:
    if "from" not in words:
        return words, (0.0, end)
    at = words.index("from")
    return words[:at], (float(words[at + 1]), float(words[at + 3]))


def first_bad(
    living: list[tuple[float, int]], compare: Callable[[int, int], bool], number: int
) -> str:
    bad = [(at, n) for at, n in living if not compare(n, number)]
    return f"there were {bad[0][1]} at {bad[0][0]:g}" if bad else ""


def reversals(moments: list[Moment]) -> int:
    """The most changes of direction that the decisions made with one pool, between two changes of
    mode: splitting and merging move every pool."""
    most = 0
    for role in ROLES:
        turns, before = 0, 0
        for moment in moments:
            step = moment.decision.target.of(role) - moment.have.of(role)
            if any("from now on" in reason for reason in moment.decision.reasons):
                most, turns, before = max(most, turns), 0, 0
            elif step:
                turns += step * before < 0
                before = step
        most = max(most, turns)
    return most
