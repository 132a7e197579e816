"""What the GPU session plans, makes of its stamps, and calls a pass."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu_handoff
from bench.gpu import models
from bench.gpu.bars import GRPC, NCCL, ONE, PREFILL, PREFILL_ALONE, bars
from bench.gpu.exactness import compare
from bench.gpu.fleet import environment
from bench.gpu.plan import Setting, groups, waves
from bench.gpu.report import report
from bench.gpu.results import (
    AgentSend,
    Control,
    Exact,
    Handoff,
    Latency,
    Ledger,
    Missing,
    RawSend,
    Results,
    Steps,
)
from bench.gpu.steps import Round, summary
from bench.gpu.timing import Crossing, Request
from bench.handoff.link_rate import LinkRate
from cluster.kv.handoff import HandoffResult

GIB = 1 << 30


def crossing(granted: float, landed: float, ended: float, first_token: float) -> Crossing:
    decode = HandoffResult(
        "h", "decode", "", bytes=GIB, granted_at=granted, last_frame_at=landed, ended_at=ended
    )
    return Crossing(decode, None, first_token)


def request(ttft: float, gaps: tuple[float, ...] = (), cross: Crossing | None = None) -> Request:
    stamps = [10 + ttft]
    for gap in gaps:
        stamps.append(stamps[-1] + gap)
    return Request(10.0, tuple(range(len(stamps))), tuple(stamps), crossing=cross)


# ---- stamps ----------------------------------------------------------------------------------


def test_what_follows_the_first_token_is_exposed() -> None:
    cross = crossing(granted=1.0, landed=1.5, ended=1.6, first_token=1.2)
    assert cross.exposed == pytest.approx(0.4)
    assert cross.overlap == pytest.approx(1 / 3)
    assert cross.gib_per_second == pytest.approx(2)


def test_a_handoff_that_ends_before_the_first_token_is_hidden() -> None:
    cross = crossing(granted=1.0, landed=1.5, ended=1.6, first_token=1.7)
    assert (cross.exposed, cross.overlap) == (0, 1)


def test_bytes_cross_from_when_prefill_knows_of_the_grant() -> None:
    late = replace(crossing(1.0, 1.5, 1.6, 1.2).decode, side="prefill", granted_at=1.25)
    cross = Crossing(crossing(1.0, 1.5, 1.6, 1.2).decode, late, 1.2)
    assert cross.gib_per_second == pytest.approx(4)


def test_gaps_of_a_request() -> None:
    taken = request(0.1, (0.3, 0.01, 0.02, 0.03))
    assert taken.ttft == pytest.approx(0.1)
    assert taken.second == pytest.approx(0.3)
    assert taken.step == pytest.approx(0.02)
    assert (request(0.1).second, request(0.1, (0.2,)).step) == (None, None)


def test_rows_are_medians() -> None:
    requests = [request(t, (0.2, t), crossing(1, 1 + t, 2, 1.9)) for t in (0.1, 0.5, 0.2)]
    row = Latency.of("x", 64, requests)
    assert (row.ttft_ms, row.ttft_least_ms, row.ttft_most_ms) == pytest.approx((200, 100, 500))
    assert row.second_ms == pytest.approx(200)
    assert row.handoff is not None
    assert row.handoff.transfer_ms == pytest.approx(200)
    assert row.handoff.mib == 1024
    assert Latency.of("x", 64, [request(0.1)]).handoff is None


def test_steps_are_sorted_by_what_they_overlap() -> None:
    stamps = [i * 0.01 for i in range(10)]  # quiet: 10 ms
    stamps += [stamps[-1] + 0.02, stamps[-1] + 0.04, stamps[-1] + 0.05]  # 20, 20 and 10 ms
    inside = crossing(granted=0.095, landed=0.12, ended=0.125, first_token=0)
    row = summary("x", 64, 1024, stamps, [Round((0, 0.09), (0.0899, 1), (inside,))])
    assert row.quiet_ms == pytest.approx(10)
    assert row.receiving_ms == pytest.approx(20)
    assert row.receiving_steps == 2
    assert row.slowdown == pytest.approx(1.0)
    assert row.whole_slowdown == pytest.approx(2 / 3)


def test_a_round_without_a_receiving_step_is_an_error() -> None:
    stamps = [i * 0.01 for i in range(10)]
    late = crossing(granted=5, landed=6, ended=7, first_token=0)
    with pytest.raises(ValueError, match="shorter than its steps"):
        summary("x", 64, 1024, stamps, [Round((0, 0.04), (0.04, 0.09), (late,))])


def test_tokens_are_compared_to_where_they_part() -> None:
    one = Request(0, (1, 2, 3), (1, 2, 3), gaps=(0.5, 0.5, 0.01))
    other = replace(one, tokens=(1, 2, 9))
    assert compare("p", "a", 8, "greedy", one, one).exact
    row = compare("p", "a", 8, "greedy", other, one)
    assert (row.same, row.tokens, row.gap_nats, row.excused) == (2, 3, 0.01, False)
    assert replace(row, reshaped=True).excused
    assert not replace(row, reshaped=True, gap_nats=0.5).excused
    assert compare("p", "a", 8, "greedy", replace(one, tokens=(1,)), one).same == 1


# ---- the plan --------------------------------------------------------------------------------


def setting(gpus: tuple[float, ...], **more: object) -> Setting:
    systems = ("nccl", "grpc", "one", "nixl")
    base = Setting("/model", "bfloat16", b"s" * 16, 16416, 8192, gpus, systems)
    return replace(base, **more)  # type: ignore[arg-type]


def names(made: object) -> list[list[str]]:
    return [[group.name for group in wave] for wave in made]  # type: ignore[attr-defined]


def test_large_cards_hold_everything_at_once() -> None:
    plan = setting((140.0, 140.0))
    assert names(waves(groups(plan), plan.gpus)) == [["nccl", "grpc", "one", "nixl"]]


def test_smaller_cards_take_two_waves() -> None:
    plan = setting((79.6, 79.6))
    assert names(waves(groups(plan), plan.gpus)) == [["nccl", "grpc"], ["one", "nixl"]]


def test_a_group_that_fits_nowhere_is_tried_alone() -> None:
    plan = setting((20.0, 20.0), systems=("nccl", "one"))
    assert names(waves(groups(plan), plan.gpus)) == [["nccl"], ["one"]]


def test_four_cards_have_a_prefill_over_two() -> None:
    made = {spec.name: spec for group in groups(setting((140.0,) * 4)) for spec in group.specs}
    assert made["nccl-tp2"].gpus == (2, 3)
    assert made["nccl-tp2"].model.tensor_parallel_size == 2
    assert made["nccl-tp2"].transport == "nccl"
    assert "grpc-tp2" not in made


def test_two_cards_share_it_only_when_asked() -> None:
    shared = groups(setting((140.0, 140.0), share_cards=True))
    assert [s.name for s in shared[1].specs] == ["grpc-prefill", "grpc-decode", "grpc-tp2"]
    assert all(len(group.specs) <= 2 for group in groups(setting((140.0, 140.0))))


def test_engines_differ_where_they_must() -> None:
    made = {spec.name: spec for group in groups(setting((140.0, 140.0))) for spec in group.specs}
    ours, plain = made["nccl-decode"], made["nixl-decode"]
    assert (ours.kind, plain.kind, made["one"].kind) == ("pdserve", "nixl", "vllm")
    assert made["nixl-prefill"].port != plain.port
    seen = environment(plain, Path("/c"), {"PATH": "/bin"})
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["PATH"]) == ("1", "/bin")
    assert seen["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(plain.port)
    assert "CUDA_VISIBLE_DEVICES" not in environment(replace(ours, gpus=()), Path("/c"), {})


def test_made_up_checkpoints_have_the_models_own_size() -> None:
    config = SimpleNamespace(**models.LLAMA_3_1_8B)
    count = sum(prod(shape) for _, shape, _ in models.checkpoint(config))
    assert count == 8_030_261_248
    assert models.kv_bytes_per_token(models.LLAMA_3_1_8B) == 128 << 10


@pytest.mark.parametrize("bad", [["--runs", "0"], ["--prompts", "1"], ["--only", "nothing"]])
def test_impossible_arguments_are_refused(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu_handoff.arguments(bad)
    assert refused.value.code == 2


def test_prompts_fit_the_model_len(tmp_path: Path) -> None:
    plan, load = gpu_handoff.settings(gpu_handoff.arguments([]), tmp_path, [140.0, 140.0])
    assert load.prompts == (512, 1024, 2048, 4096, 8192, 16384)
    assert plan.max_model_len >= max(load.prompts) + load.output
    held = load.batch * (load.batch_context + load.batch_tokens) + load.inbound
    assert held * load.kv_bytes_per_token <= plan.decode_kv_gib * GIB


# ---- bars and tables -------------------------------------------------------------------------


def latency(
    system: str, ttft: float, handoff: Handoff | None = None, prompt: int = 4096
) -> Latency:
    return Latency(system, prompt, 5, ttft, ttft, ttft, 14.0, 5.0, 0, handoff)


def good() -> Results:
    crossed = Handoff(512, 1.6, 300, 4.0, 0.9)
    over_grpc = Handoff(512, 250, 2, 80, 0.6)
    exact = Exact("pdserve nccl", PREFILL_ALONE, 4096, "greedy", 16, 16, None)
    return Results(
        about={"date": "today"},
        raw=[RawSend(4096, 512, 1.5, 340)],
        agents=[AgentSend(4096, LinkRate("nccl", 512, 2.9, 1.8, 6.0))],
        latency=[
            latency(PREFILL, 100),
            latency(ONE, 101),
            latency(NCCL, 104, crossed),
            latency(GRPC, 104, over_grpc),
        ],
        unhidden=[latency(NCCL, 9, crossed), latency(GRPC, 300, over_grpc)],
        steps=[Steps(NCCL, 64, 1024, 5, 8.0, 8.1, 0.0125, 0.05, 90, 60, 512)],
        exact=[exact],
        controls=[Control(4096, True)],
        ledgers=[Ledger("nccl-prefill", 0, 0)],
        missing=[Missing("vLLM NIXL", "it is\nnot there")],
    )


def verdicts(results: Results) -> list[bool | None]:
    return [bar.met for bar in bars(results)]


def test_good_results_meet_every_bar() -> None:
    assert verdicts(good()) == [True] * 9


def test_nothing_measured_is_no_pass() -> None:
    assert set(verdicts(Results())) == {None}


@pytest.mark.parametrize(
    ("bar", "worse"),
    [
        (0, {"latency": [latency(PREFILL, 100), latency(NCCL, 105.1)]}),
        (1, {"latency": [latency(NCCL, 100, Handoff(512, 9, 60, 5.1, 0))]}),
        (2, {"agents": [AgentSend(4096, LinkRate("nccl", 512, 2.9, 1.85, 6.0))]}),
        (3, {"steps": [replace(good().steps[0], slowdown=0.031)]}),
        (4, {"latency": [latency(ONE, 1), replace(latency(NCCL, 1), second_ms=15.1)]}),
        (5, {"latency": [latency(GRPC, 1, Handoff(512, 250, 2, 88, 0.6))]}),
        (6, {"exact": [replace(good().exact[0], same=15, gap_nats=0.001)]}),
        (7, {"controls": [Control(4096, False)]}),
        (8, {"ledgers": [Ledger("nccl-decode", 0, 1)]}),
    ],
)  # fmt: skip
def test_each_bar_can_fail(bar: int, worse: dict[str, object]) -> None:
    assert verdicts(replace(good(), **worse))[bar] is False  # type: ignore[arg-type]


def test_a_bar_over_prompts_is_judged_at_its_worst() -> None:
    short = [latency(PREFILL, 10, prompt=512), latency(NCCL, 16, prompt=512)]
    bar = bars(replace(good(), latency=[*good().latency, *short]))[0]
    assert (bar.met, bar.found) == (False, "+6.0 ms at 512 tokens")


def test_a_near_tie_excuses_only_a_reshaped_split() -> None:
    parted = replace(good().exact[0], same=15, gap_nats=0.001, reshaped=True)
    met = bars(replace(good(), exact=[parted]))[6]
    assert met.met
    assert "1 part at a near tie" in met.found


def test_every_table_is_in_the_report() -> None:
    text = report(good())
    for wanted in (
        "date: today",
        " pass |",
        "- vLLM NIXL: it is not there",
        "60 × 512 MiB",
        "16 of 16",
        "88%",
    ):
        assert wanted in text
    assert "FAIL" not in text
    assert "Bars" in report(Results())
