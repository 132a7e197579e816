"""The loads of `pdserve bench` over a client that answers as it is told to."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest

from cluster.cli import bench_run
from cluster.cli.bench_load import CLASSES, Lengths, Prompts, Shape, drawn
from cluster.cli.bench_request import Meter
from cluster.cli.bench_run import Load, Runner
from cluster.cli.bench_seen import Answered, Run, Seen
from cluster.cli.timeline import PHASES
from cluster.simulator.outcome import Targets
from cluster.simulator.workload import Arrival

SHAPE = Shape(Lengths(8, 8), Lengths(4, 4))
NOTHING = (0.0,) * len(PHASES)
TARGETS = dict.fromkeys(CLASSES, Targets(1.0, 1.0))


class ScriptedClient:
    """Answers after some turns of the loop, or never."""

    def __init__(
        self, meter: Meter, refuse: int = 0, hang_after: int = 1 << 30, turns: int = 3
    ) -> None:
        self.meter = meter
        self.turns = turns
        self.refuse = refuse
        self.hang_after = hang_after
        self.asked: list[Any] = []
        self.salts: set[str] = set()
        self.at_once = self.most = 0
        self.hangs = asyncio.Event()

    async def ask(self, request: Any, due: float | None = None) -> tuple[Seen, float]:
        self.asked.append(request)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            if len(self.asked) > self.hang_after:
                self.hangs.set()
                await asyncio.Event().wait()
            for _ in range(self.turns):
                await asyncio.sleep(0)
        finally:
            self.at_once -= 1
        if len(self.asked) <= self.refuse:
            return Seen(8, 4, "refused", reason="full"), 0.0
        self.meter.output_tokens += 4 * self.meter.open
        answered = Answered(0.1, 0.01, 0.1, 0.2, array("d", (0.01,) * 3), 0, NOTHING, None)
        return Seen(8, 4, "ok", answered=answered), 0.0


def load(asked: Iterable[Arrival], **changes: Any) -> Load:
    right = Load("w", asked, None, 0, 0.0, None, None, "standard", TARGETS)
    return replace(right, **changes)


async def play(
    asked: Load, stop: asyncio.Event | None = None, **script: Any
) -> tuple[Run, ScriptedClient]:
    meter = Meter()
    client = ScriptedClient(meter, **script)
    stopped = stop or asyncio.Event()
    runner = Runner(
        client, meter, "m", Prompts(100, 1), "salt", asked, stopped, lambda _: None  # type: ignore[arg-type]
    )  # fmt: skip
    if stop is not None:

        async def stop_when_it_hangs() -> None:
            await client.hangs.wait()
            stop.set()

        _, run = await asyncio.gather(stop_when_it_hangs(), runner.run())
        return run, client
    return await runner.run(), client


async def test_an_open_loop_waits_for_nobody() -> None:
    trace = [Arrival(0.0, 8, 4) for _ in range(20)]
    run, client = await play(load(trace), turns=100)
    assert client.most == 20
    assert (len(run.seen), run.count("ok"), run.attainment, run.cut) == (20, 20, 1.0, 0)
    assert run.seconds > 0 and run.output_tokens == 80


async def test_a_closed_loop_keeps_so_many_under_way() -> None:
    run, client = await play(load(drawn(SHAPE, 1), concurrency=3, requests=30))
    assert client.most == 3
    assert len(client.asked) == len(run.seen) == 30
    assert len({tuple(r.token_ids.ids) for r in client.asked}) == 30


async def test_what_comes_in_the_warm_up_is_not_counted() -> None:
    trace = [Arrival(at, 8, 4) for at in (0.0, 0.01, 0.05, 0.06, 0.07)]
    run, client = await play(load(trace, warm_up=0.03))
    assert (len(client.asked), len(run.seen)) == (5, 3)
    run, client = await play(load(trace, warm_up=0.03, requests=2))
    assert (len(client.asked), len(run.seen)) == (4, 2)
    run, client = await play(load(trace, warm_up=0.03, seconds=0.025))
    assert (len(client.asked), len(run.seen)) == (3, 1)


async def test_nothing_that_comes_is_measured_too() -> None:
    """The time is not over with the last request in it."""
    trace = [Arrival(0.0, 8, 4), Arrival(3600.0, 8, 4)]
    run, client = await play(load(trace, seconds=0.5))
    assert (len(client.asked), run.count("ok"), run.interrupted) == (1, 1, False)
    assert run.seconds > 0.1


async def test_time_ends_a_closed_loop() -> None:
    run, _ = await play(load(drawn(SHAPE, 1), concurrency=2, seconds=0.3))
    assert run.count("ok") == len(run.seen) > 0 and not run.interrupted


async def test_a_refused_one_counts_and_the_next_one_comes() -> None:
    run, _ = await play(load(drawn(SHAPE, 1), concurrency=1, requests=3), refuse=2)
    assert [each.end for each in run.seen] == ["refused", "refused", "ok"]
    assert run.attainment == 1 / 3


async def test_an_interruption_keeps_what_was_seen() -> None:
    stop = asyncio.Event()
    endless = load(drawn(SHAPE, 1), concurrency=2)
    run, client = await play(endless, stop, hang_after=10)
    assert run.interrupted and run.count("ok") == len(run.seen) <= 10
    assert run.cut == len(client.asked) - len(run.seen) and client.at_once == 0
    stop = asyncio.Event()
    trace = [Arrival(0.0, 8, 4), Arrival(3600.0, 8, 4)]
    run, _ = await play(load(trace), stop, hang_after=0)
    assert (run.interrupted, run.cut, len(run.seen)) == (True, 1, 0)


async def test_a_traces_classes_are_kept_where_they_are_ours() -> None:
    trace = [Arrival(0.0, 8, 4, kind=kind) for kind in ("batch", "chat", "")]
    _, client = await play(load(trace, slo_class="interactive", own_targets=True))
    assert [r.slo_class for r in client.asked] == [3, 1, 1]
    assert {r.targets.ttft_seconds for r in client.asked} == {1.0}
    assert {(r.model, r.cache_salt) for r in client.asked} == {("m", "salt")}


async def test_a_request_has_the_targets_of_its_class() -> None:
    trace = [Arrival(0.0, 8, 4, kind=kind) for kind in ("interactive", "batch", "")]
    targets = {"interactive": Targets(0.01, 1.0), "standard": Targets(1.0, 1.0)}
    run, _ = await play(load(trace, targets=targets))  # the answers' TTFT is 0.1
    assert [each.slo_class for each in run.seen] == ["interactive", "batch", "standard"]
    assert (run.with_targets, run.attained) == (2, 1)


async def test_an_open_loop_that_is_behind_lets_answers_come() -> None:
    """All were due at once: each is sent in a turn of its own."""
    trace = [Arrival(0.0, 8, 4) for _ in range(50)]
    run, client = await play(load(trace))
    assert run.count("ok") == 50
    assert client.most < 50, "answers came in between"


async def test_an_open_loop_that_stays_behind_ends_with_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_run, "BEHIND_SECONDS", 0.0)
    endless = repeat(Arrival(0.0, 8, 4))
    run, client = await play(load(endless, seconds=0.1))
    assert run.count("ok") == len(run.seen) == len(client.asked) > 0
