"""The options of `pdserve bench`: which contradict each other, and what they come to."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import access, bench
from cluster.cli.bench import Bench, Wanted, class_targets
from cluster.cli.bench_client import Served
from cluster.cli.bench_load import Lengths
from cluster.cli.bench_run import Load
from cluster.errors import InvalidRequest, Unauthenticated
from cluster.simulator.outcome import Targets

MODEL = Served("m", 800, 2048)


def loads(model: Served = MODEL, **options: Any) -> list[Load]:
    wanted = Wanted(**options)
    made = Bench(("h:1",), ("h:1", ""), "h:1", wanted, Targets(1.0, 1.0), lambda _: None)
    made._prompts(model)
    return list(made._loads(model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rates": (1.0,), "concurrency": 2}, "concurrency: --rate says already"),
        ({"rates": (1.0,), "trace": Path("t")}, "trace: --rate says already"),
        ({"slo_class": "urgent"}, "class: 'urgent' is none of interactive, standard, batch"),
        ({"trace": Path("t"), "prompt": Lengths(1, 1)}, "trace: it has the lengths"),
        ({"own_targets": True}, "own-targets: give them"),
        ({"burstiness": 1e9}, "burstiness: must be at most 100"),
        ({"timeout": 100_000.0}, "timeout: must be at most 86400"),
        ({"timeout": math.inf}, "timeout: must be at most 86400"),
        ({"timeout": math.nan}, "timeout: must be at most 86400"),
        ({"warm_up": math.nan}, "warm-up: must be a number"),
        ({"may_fail": math.nan}, "may-fail: must be a number"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        Wanted(**options)


def test_without_an_option_it_is_a_modest_load_that_ends() -> None:
    (load,) = loads()
    assert (load.concurrency, load.rate, load.warm_up, load.seconds) == (4, None, 3.0, 30.0)
    assert load.words == "4 at a time, prompts of 512, answers of 64 tokens"
    (load,) = loads(requests=7)
    assert (load.seconds, load.requests) == (None, 7)
    (load,) = loads(Served("m", 800, 100))
    (asked,) = islice(load.asked, 1)
    assert asked.prompt + asked.output <= 100


def test_each_rate_is_a_load_of_its_own() -> None:
    found = loads(rates=(2.0, 4.0), slo_class="batch")
    assert [(load.rate, load.concurrency, load.slo_class) for load in found] == [
        (2.0, 0, "batch"), (4.0, 0, "batch"),
    ]  # fmt: skip


def test_a_trace_ends_itself_and_has_no_warm_up(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:00.0,100,10\n2023-11-16 18:15:08.0,200,20\n"
    )
    (load,) = loads(trace=trace, speed=2.0)
    assert (load.warm_up, load.seconds, load.requests) == (0.0, None, None)
    assert [(a.at, a.prompt, a.output) for a in load.asked] == [(0.0, 100, 10), (4.0, 200, 20)]
    with pytest.raises(InvalidRequest, match=r"warm-up: the trace is over after 4\.0 s"):
        loads(trace=trace, speed=2.0, warm_up=5.0)
    with pytest.raises(InvalidRequest, match="line 3: 200 \\+ 20 tokens are over the model's 150"):
        loads(Served("m", 800, 150), trace=trace)
    assert set(load.targets) == {"interactive", "standard", "batch"}


def test_targets_that_the_plan_makes_up_are_none() -> None:
    """Routers hold no request of the class to them."""
    each = {"ttft_seconds": 2.0, "tpot_seconds": 0.1}
    of = dict.fromkeys(("interactive", "standard", "batch"), each)
    plan = {"models": [{"model": "m", "targets": of}, {"model": "n", "targets": {}}]}
    known = class_targets(plan, "m", ("standard", "batch"))
    assert known == {"standard": Targets(2.0, 0.1)}
    assert class_targets(plan, "n", ("standard",)) == {}


async def test_the_operators_token_goes_before_a_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_TOKEN", "tenant")
    monkeypatch.delenv("PDSERVE_CA_FILE", raising=False)
    shown: list[str] = []

    def made(_: str, *, interceptors: list[Any], **__: Any) -> None:
        shown.append(interceptors[0]._header[1])

    monkeypatch.setattr(access.grpc.aio, "insecure_channel", made)
    access.channel("h:1", "operator", ours=True)
    access.channel("h:1", "", ours=True)
    access.channel("h:1", "operator")
    assert shown == ["Bearer operator", "Bearer tenant", "Bearer tenant"]


async def test_without_an_answer_about_routers_the_known_one_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refused(_: Any) -> None:
        raise Unauthenticated("it is the operator's")

    monkeypatch.setattr(bench, "cluster_view", refused)
    unasked = Bench((), ("h:1", "token"), "h:2", Wanted(), None, lambda _: None)
    assert await unasked._routers() == ("h:2",)
