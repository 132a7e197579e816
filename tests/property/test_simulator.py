"""The simulator keeps its laws: nothing is lost, work is conserved, runs of steps are exact."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner.performance import (
    Contention,
    DecodeCost,
    HandoffCost,
    Launch,
    Performance,
    PrefillCost,
)
from cluster.simulator.engine import Engine, EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.job import Attempt, Job
from cluster.simulator.outcome import Outcome
from cluster.simulator.workload import Arrival, poisson
from cluster.simulator.world import World
from router.output import Stage

WORKER = Performance(
    prefill=PrefillCost(0.002, 2e-5, 1e-10, 0.004),
    decode=DecodeCost(0.004, 3e-8, 1e-5),
    decode_large=DecodeCost(0.001, 3e-8, 3e-5),
    large_batch=150,
    handoff=HandoffCost(0.001, 1e11, 32),
    kv_bytes_per_token=131072,
    kv_capacity=30_000,
)

workloads = st.builds(
    lambda seed, rate, longest: poisson(
        rate, 4.0, lambda r: (r.randint(1, longest), r.randint(1, 200)), seed
    ),
    st.integers(0, 999),
    st.sampled_from([2.0, 20.0, 80.0]),
    st.sampled_from([50, 3000, 12_000]),
)
deployments = st.builds(
    lambda split, mixes, queued, dispatch, launch: Deployment(
        replace(WORKER, dispatch=dispatch, launch=launch),
        prefill=split[0],
        decode=split[1],
        both=split[2],
        limits=EngineLimits(max_tokens=2048, mixes=mixes),
        max_running=40,
        max_queued=queued,
        timeout=30.0,
    ),
    st.sampled_from([(1, 1, 0), (2, 3, 0), (0, 0, 3), (1, 1, 1), (3, 1, 0)]),
    st.booleans(),
    st.sampled_from([0, 10_000]),
    st.sampled_from([0.0, 0.02]),
    st.sampled_from([None, Launch(256, 0.01, 0.02)]),
)


@settings(max_examples=60, deadline=None)
@given(workloads, deployments, st.data())
def test_every_request_ends_once_and_everything_is_given_back(
    arrivals: list[Arrival], deployment: Deployment, data: st.DataObject
) -> None:
    world = World(deployment, seed=1)
    workers = list(world.fleet.workers.values())
    for _ in range(data.draw(st.integers(0, 3))):
        worker = data.draw(st.sampled_from(workers))
        act = data.draw(st.sampled_from(["fail", "die", "flip", "remove"]))
        at = data.draw(st.floats(0, 4))
        calls = {
            "fail": lambda w=worker: world.fleet.fail(w, restart_after=0.5),
            "die": lambda w=worker: world.fleet.fail(w, restart_after=None),
            "flip": lambda w=worker: world.fleet.flip(w, "both"),
            "remove": lambda w=worker: world.fleet.remove(w),
        }
        world.agenda.at(at, calls[act])
    ends: list[Outcome] = []
    world.on_end = ends.append
    outcomes = world.run(arrivals)

    assert len(ends) == len(arrivals) == len(outcomes)
    for outcome in outcomes:
        assert (outcome.error == "") == math.isfinite(outcome.ttft)
        assert outcome.ended_at <= outcome.at + deployment.timeout + 1e-6
    assert world.running == 0
    while world.agenda.next_at < math.inf:  # what is on its way comes home
        world.agenda.step()
    for worker in world.fleet.workers.values():
        engine = worker.engine
        assert engine.free_tokens == WORKER.kv_capacity
        assert engine.batch == 0 and engine.idle
        assert (worker.queued_prompt_tokens, worker.running_sequences) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(workloads, deployments)
def test_littles_law(arrivals: list[Arrival], deployment: Deployment) -> None:
    """The requests in the system, over time, are those that arrive times how long each stays."""
    world = World(deployment)
    present = area = last = 0.0

    def passes() -> None:
        nonlocal area, last
        area += present * (world.agenda.now - last)
        last = world.agenda.now

    def arrives(_: Arrival) -> None:
        nonlocal present
        passes()
        present += 1

    def ends(_: Outcome) -> None:
        nonlocal present
        passes()
        present -= 1

    world.on_arrival, world.on_end = arrives, ends
    outcomes = world.run(arrivals)
    assert present == 0
    assert area == pytest.approx(sum(o.ended_at - o.at for o in outcomes), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(workloads, st.integers(1, 4))
def test_work_is_conserved(arrivals: list[Arrival], workers: int) -> None:
    """Where batching saves nothing, the workers are busy for exactly the work that came."""
    linear = Performance(
        PrefillCost(0.0, 2e-5, once=0.003),
        DecodeCost(0.001, 0.0),
        DecodeCost(0.001, 0.0),
        10**9,
        HandoffCost(0.0, 1e12),
        1.0,
        10**9,
    )
    ones = [Arrival(a.at, a.prompt, 1) for a in arrivals]
    world = World(Deployment(linear, prefill=workers, decode=1))
    outcomes = world.run(ones)
    busy = sum(w.engine.busy_seconds for w in world.fleet.workers.values())
    assert busy == pytest.approx(sum(0.003 + 2e-5 * a.prompt for a in ones))
    if workers == 1 and ones:  # one server idles only when nothing waits: Lindley's recursion
        free = 0.0
        for arrival in ones:
            free = max(free, arrival.at) + 0.003 + 2e-5 * arrival.prompt
        assert max(o.ended_at for o in outcomes) == pytest.approx(free)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_a_run_of_decode_steps_is_what_single_steps_are(seed: int, count: int) -> None:
    rng = random.Random(seed)
    joins = sorted(
        (rng.uniform(0, 0.3), rng.randint(1, 900), rng.randint(2, 60)) for _ in range(count)
    )
    engine, ends = Engine(WORKER, EngineLimits(), 512), {}
    pending = list(enumerate(joins))
    while pending or engine.batch or engine.next_event < math.inf:
        if pending and pending[0][1][0] <= engine.next_event:
            name, (at, prompt, output) = pending.pop(0)
            job = Job(Attempt(name, str(name)), Stage.DECODE, prompt, output)
            assert engine.reserve(at, job)
            engine.decode(at, job)
        else:
            now = engine.next_event
            ends |= {job.attempt.index: now for job in engine.advance(now).ended}
    assert ends == pytest.approx(stepped(joins))


def stepped(joins: list[tuple[float, int, int]]) -> dict[int, float]:
    """When each decode ends, one step after another."""
    now, ends, running = 0.0, {}, {}
    waiting = dict(enumerate(joins))
    while waiting or running:
        if not running:
            now = max(now, min(at for at, _, _ in waiting.values()))
        for name in [n for n, (at, _, _) in waiting.items() if at <= now]:
            _, prompt, output = waiting.pop(name)
            running[name] = (prompt + 1, prompt + output)
        now += WORKER.decode_seconds(len(running), sum(context for context, _ in running.values()))
        for name, (context, last) in list(running.items()):
            if context + 1 == last:
                ends[name] = now
                del running[name]
            else:
                running[name] = (context + 1, last)
    return ends


def test_the_same_seed_gives_the_same_outcomes() -> None:
    arrivals = poisson(50, 10, lambda r: (r.randint(1, 4000), r.randint(1, 300)), 3)
    deployment = Deployment(WORKER, prefill=2, decode=3)
    assert World(deployment, seed=5).run(arrivals) == World(deployment, seed=5).run(arrivals)


def test_admission_keeps_to_a_pace_as_the_routers_does() -> None:
    arrivals = poisson(60.0, 6.0, lambda r: (r.randint(100, 300), r.randint(50, 150)), 1)
    bound = WORKER.decode_seconds(32, 32 * 400)

    def slowest(pace_within: float) -> float:
        deployment = Deployment(WORKER, 1, 1, timeout=60.0, pace_within=pace_within)
        outcomes = World(deployment, seed=1).run(arrivals)
        assert not any(outcome.error for outcome in outcomes)
        return max(outcome.tpot for outcome in outcomes)

    assert slowest(bound) <= bound < slowest(math.inf)


@settings(max_examples=30, deadline=None)
@given(workloads, st.sampled_from([(1, 1, 0), (2, 2, 0), (0, 0, 2)]))
def test_contention_of_one_changes_nothing(
    arrivals: list[Arrival], split: tuple[int, int, int]
) -> None:
    """Sharing a host whose steps do not slow each other is not sharing it."""
    nearly = replace(WORKER, contention=Contention(1.0 + 1e-12, 1.0))
    apart = World(Deployment(WORKER, *split), seed=1).run(arrivals)
    shared = World(Deployment(nearly, *split), seed=1).run(arrivals)
    assert [o.error for o in shared] == [o.error for o in apart]
    for mine, other in zip(shared, apart, strict=True):
        assert mine.ttft == pytest.approx(other.ttft, rel=1e-6)
        assert mine.tpot == pytest.approx(other.tpot, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 0.5),
    st.integers(200, 8000),
    st.integers(2, 300),
    st.floats(1.0, 3.0),
    st.floats(1.0, 3.0),
)
def test_steps_are_slowed_for_as_long_as_the_other_worker_works(
    at: float, prompt: int, output: int, by_decode: float, by_prefill: float
) -> None:
    """A prompt comes at `at`, while the other worker decodes: each has its own work done when its
    slowed and its unslowed seconds add up to it."""
    worker = replace(
        WORKER,
        handoff=HandoffCost(0.0, 1e15),
        decode=DecodeCost(0.004, 0.0),
        contention=Contention(by_decode, by_prefill),
    )
    deployment = Deployment(worker, prefill=1, decode=1, placement_mode="always")
    begins = worker.prefill_seconds(1)
    first, second = World(deployment, seed=1).run(
        [Arrival(0.0, 1, output), Arrival(begins + at, prompt, 1)]
    )
    decoding, computing = 0.004 * (output - 1), worker.prefill_seconds(prompt)
    if at >= decoding:
        assert first.ended_at - begins == pytest.approx(decoding)
        assert second.ttft == pytest.approx(computing)
        return
    left = decoding - at  # of the decode's own seconds, when the prompt comes
    together = min(left * by_prefill, computing * by_decode)
    assert first.ended_at - begins == pytest.approx(at + together + left - together / by_prefill)
    assert second.ttft == pytest.approx(together + computing - together / by_decode)


def test_more_contention_is_never_faster() -> None:
    arrivals = poisson(12.0, 6.0, lambda r: (r.randint(1, 3000), r.randint(2, 200)), 4)

    def means(factor: float) -> tuple[float, float]:
        worker = replace(WORKER, contention=Contention(factor, factor))
        outcomes = World(Deployment(worker, 1, 1, placement_mode="always"), 1).run(arrivals)
        count = len(outcomes)
        return sum(o.ttft for o in outcomes) / count, sum(o.tpot for o in outcomes) / count

    seen = [means(factor) for factor in (1.0, 1.2, 1.5, 2.0)]
    assert [ttft for ttft, _ in seen] == sorted(ttft for ttft, _ in seen)
    assert [tpot for _, tpot in seen] == sorted(tpot for _, tpot in seen)
    assert seen[0] < seen[-1]


def test_what_a_prompt_takes_from_those_that_decode_on_its_host() -> None:
    """Its way to its engine is slowed; when it ends, the decodes lose a constant, once."""
    apart = replace(
        WORKER, decode=DecodeCost(0.004, 0.0), handoff=HandoffCost(0.0, 1e15), dispatch=0.01
    )
    arrivals = [Arrival(0.0, 1, 200), Arrival(0.3, 500, 2), Arrival(2.0, 500, 2)]

    def ends(worker: Performance) -> list[Outcome]:
        return World(Deployment(worker, 1, 1, placement_mode="always")).run(arrivals)

    first, second, third = ends(apart)
    shared = replace(apart, contention=Contention(dispatch=3.0, handoff=0.007))
    slowed, beside, alone = ends(shared)
    assert slowed.ended_at == pytest.approx(first.ended_at + 0.007)
    assert beside.ttft == pytest.approx(second.ttft + 0.02)
    assert (alone.ttft, alone.tpot) == pytest.approx((third.ttft, third.tpot))
