"""The advisor: which option wins where, what it refuses, what it draws."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.advisor import evaluate
from cluster.advisor.advice import advise
from cluster.advisor.contest import Task, contest
from cluster.advisor.evaluate import Point, Verdict, goodput_on
from cluster.advisor.plots import plots
from cluster.advisor.question import Option, Question, check_reachable, window
from cluster.advisor.report import report
from cluster.advisor.svg import Axis, Series, chart
from cluster.cli.main import app
from cluster.errors import InvalidRequest
from cluster.planner.hardware import hardware
from cluster.planner.profile import DecodeSample, PrefillSample, Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape
from cluster.simulator.engine import EngineLimits
from cluster.simulator.goodput import Goal, goodput, holds
from cluster.simulator.outcome import Targets, parse_slo
from cluster.simulator.workload import Arrival, mean_rate, poisson, repeated

SHAPE, GPU = load_shape("llama-3.1-8b"), hardware("H200")
LONG_PROMPTS = poisson(8, 30, lambda r: (r.randint(6000, 10_000), r.randint(40, 160)), 1)
SHORT_PROMPTS = poisson(8, 30, lambda r: (r.randint(20, 200), r.randint(200, 600)), 2)

MIXED = poisson(8, 30, lambda r: (r.choice((300, 9000)), r.randint(50, 400)), 3)


def question(arrivals: Sequence[Arrival], slo: str, gpus: int = 4) -> Question:
    return Question(
        SHAPE,
        GPU,
        roofline(SHAPE, GPU),
        gpus,
        Goal(parse_slo(slo)),
        tuple(arrivals),
        3.5,
        EngineLimits(max_tokens=2048),
    )


def here(tasks: Sequence[Task]) -> Iterator[object]:
    return (call(*arguments) for call, arguments in tasks)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "MIN_REQUESTS", 80)
    monkeypatch.setattr(evaluate, "MAX_REQUESTS", 120)


def test_tight_tpot_and_long_prompts_want_a_split() -> None:
    advice = advise(question(LONG_PROMPTS, "ttft=2,tpot=0.012"), here)
    assert not advice.best.option.both
    assert advice.best.option.prefill > advice.best.option.decode
    whole = next(v for v in advice.verdicts if v.option.both)
    assert whole.goodput < 0.7 * advice.best.goodput
    assert advice.second_loses is not None and 0 < advice.second_loses < 1
    assert [v.goodput for v in advice.verdicts] == sorted(
        (v.goodput for v in advice.verdicts), reverse=True
    )


@pytest.mark.slow
def test_short_prompts_and_loose_targets_want_none() -> None:
    advice = advise(question(SHORT_PROMPTS, "ttft=2,tpot=0.05", gpus=2), here)
    assert advice.best.option == Option(both=2)


@pytest.mark.parametrize(
    ("arrivals", "slo", "gpus"),
    [
        (LONG_PROMPTS, "ttft=2,tpot=0.012", 4),
        (LONG_PROMPTS, "ttft=0.6", 3),
        (MIXED, "ttft=1,tpot=0.01", 4),
    ],
)
def test_few_full_runs_find_the_two_that_all_of_them_find(
    arrivals: Sequence[Arrival], slo: str, gpus: int
) -> None:
    asked = question(sorted(arrivals, key=lambda a: a.at), slo, gpus)
    fast, all_in_full = contest(asked, here), contest(asked, here, exhaustive=True)
    assert fast[:2] == all_in_full[:2]
    assert not any(verdict.rough for verdict in all_in_full)
    assert {v.option for v in fast} == set(asked.options())
    assert all(v.goodput <= fast[1].goodput for v in fast[2:])


@pytest.mark.parametrize("best_looks", [0.6, 1.2])
def test_a_rough_look_that_is_off_does_not_change_the_winner(best_looks: float) -> None:
    asked = question(LONG_PROMPTS, "ttft=2,tpot=0.012", 4)
    right = contest(asked, here, exhaustive=True)

    def off(tasks: Sequence[Task]) -> Iterator[object]:
        for (call, _), result in zip(tasks, here(tasks), strict=True):
            yield [misjudged(v) for v in result] if call is evaluate.roughly else result  # type: ignore[attr-defined]

    def misjudged(verdict: Verdict) -> Verdict:
        by = best_looks if verdict.option == right[0].option else 1.0
        return replace(verdict, goodput=verdict.goodput * by)

    found = contest(asked, off)
    assert found[0].option == right[0].option
    assert not found[1].rough


def test_targets_that_no_load_spoils_have_a_goodput_on_every_option() -> None:
    few = [Arrival(i / 8, 100, 4) for i in range(20)]
    advice = advise(question(few, "ttft=60,tpot=9", 3), here)
    assert all(v.goodput > 100 and v.goodput99 == v.goodput for v in advice.verdicts)


def test_a_short_trace_is_repeated_until_queues_can_build_up() -> None:
    few = MIXED[:12]
    short, long = question(few, "ttft=1", 2), question(repeated(few, 100), "ttft=1", 2)
    of_short, of_long = advise(short, here), advise(long, here)
    assert [v.goodput for v in of_short.verdicts] == [v.goodput for v in of_long.verdicts]
    idle = evaluate.run_at(short, Option(both=2), few, of_short.best.goodput * 4)
    assert idle.attainment(short.goal.targets) == 1.0  # what they alone would have promised


def test_repetitions_keep_the_rate_and_share_no_prefixes() -> None:
    few = [Arrival(5 + i / 4, 100, 9, (7, 8)) for i in range(4)]
    again = repeated(few, 9)
    assert len(again) == 12 and again[:4] == tuple(few)
    assert mean_rate(again) == pytest.approx(mean_rate(few))
    assert [len({a.blocks for a in again[i : i + 4]}) for i in (0, 4, 8)] == [1, 1, 1]
    assert len({block for a in again for block in a.blocks}) == 6
    assert repeated(few, 3) == tuple(few)


def test_one_option_has_no_second() -> None:
    advice = advise(question(MIXED, "ttft=1", gpus=1), here)
    assert advice.second_loses is None and report(advice)["second_loses"] is None


def test_targets_are_spoken_without_those_that_ask_for_nothing() -> None:
    assert str(parse_slo("ttft=0.5,tpot=0.02")) == "TTFT ≤ 0.5 s and TPOT ≤ 0.02 s"
    assert str(parse_slo("tpot=0.02")) == "TPOT ≤ 0.02 s"


def test_every_option_is_answered_and_drawn() -> None:
    advice = advise(question(LONG_PROMPTS, "ttft=2,tpot=0.012", gpus=3), here)
    assert {str(v.option) for v in advice.verdicts} == {"3 aggregated", "1P:2D", "2P:1D"}
    for verdict, cost in zip(advice.verdicts, advice.costs, strict=True):
        assert cost.total == pytest.approx(3.5 * 3 / 3600 / verdict.goodput)
        assert verdict.goodput99 <= verdict.goodput
    values = json.loads(json.dumps(report(advice), allow_nan=False))
    assert values["best"] == str(advice.best.option)
    assert len(values["options"]) == 3
    drawn = plots(advice)
    assert sorted(drawn) == ["frontier.svg", "goodput.svg", "roofline.svg", "ttft-by-prompt.svg"]
    for svg in drawn.values():
        assert ET.fromstring(svg).tag.endswith("svg")
        assert "nan" not in svg


def test_goodput_is_where_the_goal_stops_to_hold() -> None:
    asked = question(LONG_PROMPTS, "ttft=2,tpot=0.012")
    deployment = asked.deployment(Option(2, 2))
    best = goodput(deployment, LONG_PROMPTS, asked.goal, precision=0.02)
    from cluster.simulator.workload import at_rate

    assert holds(deployment, at_rate(LONG_PROMPTS, best * 0.95), asked.goal)
    assert not holds(deployment, at_rate(LONG_PROMPTS, best * 1.1), asked.goal)


def test_goodput_between_two_points() -> None:
    def point(rate: float, met: int) -> Point:
        return Point(rate, tuple((0.0 if i < met else math.inf, 0.0, 1) for i in range(10)))

    goal = Goal(Targets(1, 1), 0.85)
    assert goodput_on([point(1, 10), point(2, 9), point(3, 8)], goal) == pytest.approx(2.5)
    assert goodput_on([point(1, 8), point(2, 8)], goal) == 0.0
    assert goodput_on([point(1, 10), point(2, 10)], goal) == 2.0


def test_targets_below_what_an_idle_worker_takes_are_refused_with_the_floor() -> None:
    with pytest.raises(InvalidRequest, match=r"the floor for 90% is ttft=0\.2"):
        check_reachable(roofline(SHAPE, GPU), LONG_PROMPTS, Goal(parse_slo("ttft=0.05")))
    with pytest.raises(InvalidRequest, match=r"tpot=0\.005"):
        check_reachable(roofline(SHAPE, GPU), LONG_PROMPTS, Goal(parse_slo("tpot=0.001")))


@pytest.mark.parametrize("gpus", [0, -1, 3])
def test_gpus_that_make_no_whole_workers_are_refused(gpus: int) -> None:
    asked = question(LONG_PROMPTS, "ttft=2", gpus)
    asked = replace(asked, performance=roofline(SHAPE, GPU, 2))
    with pytest.raises(InvalidRequest, match="gpus"):
        asked.options()


@pytest.mark.parametrize("slo", ["", "ttft", "ttft=0", "ttft=-1", "tpot=nan", "itl=1", "ttft=inf"])
def test_targets_that_are_none_are_refused(slo: str) -> None:
    with pytest.raises(InvalidRequest, match="slo"):
        parse_slo(slo)


def test_a_window_has_the_traces_rate() -> None:
    calm = [Arrival(float(i), 10, 10) for i in range(100)]
    burst = [Arrival(100 + i / 100, 10, 10) for i in range(100)]
    picked = window([*calm, *burst], 50)
    assert len(picked) == 50
    assert picked[0].at != 0.0


def test_a_chart_of_nothing_is_a_chart() -> None:
    svg = chart("a < b", Axis("x", log=True), Axis("y"), [Series("s", [(math.nan, 1), (0, 2)])])
    assert ET.fromstring(svg) is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": "nothing"}, "model"),
        ({"--gpu": "Z1"}, "hardware table"),
        ({"--gpus": "0"}, "gpus"),
        ({"--slo": "ttft=0.001"}, "floor"),
        ({"--trace": "/nowhere.csv"}, "cannot be read"),
        ({"--share": "1.5"}, "share"),
        ({"--profile": "/nowhere.json"}, "/nowhere.json cannot be read: No such file"),
        ({"--plot": "/dev/null/plots"}, "/dev/null/plots cannot be made: Not a directory"),
    ],
)
def test_the_command_names_the_option_that_is_wrong(
    tmp_path: Path, change: dict[str, str], said: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{"at": %d, "prompt": 100, "output": 9}\n'
    trace.write_text(line % 0 + line % 1)
    options = {
        "--trace": str(trace),
        "--model": "llama-3.1-8b",
        "--gpu": "H200",
        "--gpus": "2",
        "--slo": "ttft=1",
        **change,
    }
    result = CliRunner().invoke(app, ["plan", *(x for pair in options.items() for x in pair)])
    assert isinstance(result.exception, InvalidRequest)
    assert said in str(result.exception)


def test_the_command_refuses_a_profile_of_other_hardware(tmp_path: Path) -> None:
    trace, profile = tmp_path / "trace.jsonl", tmp_path / "profile.json"
    line = '{"at": %d, "prompt": 100, "output": 9}\n'
    trace.write_text(line % 0 + line % 1)
    samples = tuple(PrefillSample(n, 0, n / 1e4) for n in (100, 200, 400))
    steps = tuple(DecodeSample(n, 100 * n, 0.01) for n in (1, 2, 4))
    profile.write_text(Profile("llama-3.1-8b", "A100", 1, samples, steps).to_json())
    options = ("--model", "llama-3.1-8b", "--gpu", "H200", "--gpus", "2", "--slo", "ttft=1")
    where = ("--trace", str(trace), "--profile", str(profile))
    result = CliRunner().invoke(app, ["plan", *options, *where])
    assert isinstance(result.exception, InvalidRequest)
    assert "1 × A100, not with llama-3.1-8b on 1 × H200" in str(result.exception)


def test_simulate_prints_one_deployment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster.cli import simulate
    from cluster.cli.plan import Asked
    from cluster.cli.terminal import Terminal

    trace = tmp_path / "trace.jsonl"
    lines = [json.dumps({"at": i / 4, "prompt": 300, "output": 20}) for i in range(40)]
    trace.write_text("\n".join(lines))
    asked = Asked(trace, "llama-3.1-8b", "H200", 2, "ttft=1", 0.9, 1, 2048, None, None, 0)
    assert simulate.run(Terminal(), asked, (1, 1, 0), None, as_json=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["requests"] == 40
    assert values["attainment"] == 1.0
    with pytest.raises(InvalidRequest, match="workers"):
        simulate.run(Terminal(), asked, (1, 0, 0), None, as_json=True)
