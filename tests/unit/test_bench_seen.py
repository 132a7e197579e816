"""What `pdserve bench` makes of what it saw."""

from __future__ import annotations

import io
import json
import math
from array import array
from dataclasses import replace

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from rich.console import Console

from cluster.cli import bench, bench_client
from cluster.cli.bench_report import show, values
from cluster.cli.bench_request import Meter, Watch, request_of
from cluster.cli.bench_seen import Answered, ClientTimes, Run, Seen, goodput
from cluster.cli.timeline import PHASES
from cluster.rpc.client import CallFailed
from cluster.simulator.outcome import Targets
from pdserve.v1 import inference_pb2

TARGETS = Targets(0.5, 0.05)
QUIET = ClientTimes(0.001, 0.002, None, 0.1)


def ok(ttft: float = 0.1, tpot: float = 0.01, moved: int | None = None) -> Seen:
    phases = tuple(0.0 if name != "decode" else 0.4 for name in PHASES)
    gaps = array("d", (0.02, 0.0, 0.01))
    answered = Answered(ttft, tpot, ttft + 0.01, 0.6, gaps, 20, phases, moved)
    return Seen(100, 4, "ok", answered=answered)


def run(*seen: Seen, rate: float | None = None, targets: Targets | None = TARGETS) -> Run:
    of = {} if targets is None else {"": targets}
    return Run("a load", rate, 10.0, seen, 1000, 200, QUIET, of)


def test_attainment_is_of_all_that_were_offered() -> None:
    refused = Seen(100, 4, "refused", reason="no room for 12 more")
    failed = Seen(100, 4, "failed", reason="UNAVAILABLE: gone")
    seen = run(ok(), ok(ttft=0.51), ok(tpot=0.051), ok(0.5, 0.05), refused, failed, rate=1.0)
    assert (seen.attained, seen.attainment) == (2, 2 / 6)
    assert [seen.count(end) for end in ("ok", "refused", "failed")] == [4, 1, 1]
    loose = run(ok(ttft=99.0), refused, targets=Targets(math.inf, 0.05))
    assert loose.attainment == 0.5
    assert run().attainment is None and run(ok(), targets=None).attainment is None


def test_figures_are_of_those_that_succeeded() -> None:
    slow = [ok(ttft=0.1 * i) for i in range(1, 11)]
    seen = run(*slow, Seen(100, 4, "refused", reason="full"))
    spread = seen.spreads()["ttft"]
    assert spread.percentiles.p50 == pytest.approx(0.55)
    assert spread.mean == pytest.approx(0.55)
    assert seen.spreads()["itl"].mean == pytest.approx(0.01)
    assert seen.cached_share == pytest.approx(0.2)
    assert seen.per_second(seen.output_tokens) == 20.0
    assert sum(seen.phases().values()) == pytest.approx(0.4)


def test_what_was_refused_or_failed_is_the_commands_own_failure() -> None:
    refused, failed = Seen(1, 1, "refused", reason="full"), Seen(1, 1, "failed", reason="gone")
    good = run(*[ok()] * 99)
    assert bench.shortfall([good], 0.0) == ""
    for end in (refused, failed):
        one = run(*[ok()] * 99, end)
        assert "1.00% of 100 requests" in bench.shortfall([one], 0.0)
        assert bench.shortfall([one], 0.01) == ""
    half = run(ok(), failed)
    assert "in 1 of 2 loads" in bench.shortfall([good, half], 0.4)
    assert bench.shortfall([good, run(failed)], 1.0) == ""
    for runs in ([], [run()], [run(refused), run(failed)]):
        assert bench.shortfall(runs, 1.0) == "no request was served"


def test_reasons_are_told_without_their_numbers() -> None:
    seen = run(*(Seen(1, 1, "refused", reason=f"{n} wait, of 1,000") for n in range(3)))
    assert seen.reasons() == {("refused", "… wait, of …"): 3}


def test_goodput_is_the_highest_rate_that_was_met() -> None:
    bad = Seen(1, 1, "refused", reason="full")
    runs = [
        run(*[ok()] * 10, rate=2.0),
        run(*[ok()] * 95, *[bad] * 5, rate=4.0),
        run(*[ok()] * 5, *[bad] * 5, rate=8.0),
    ]
    assert (goodput(runs, 0.9), goodput(runs, 0.99), goodput(runs[2:], 0.9)) == (4.0, 2.0, None)
    found = values(["h:1"], "m", runs)
    assert found["goodput_requests_per_second"] == {"90%": 4.0, "99%": 2.0}
    text = io.StringIO()
    show(Console(file=text, width=200), ["h:1"], "m", runs)
    assert "goodput at 90%: 4 requests/s" in text.getvalue()
    assert "5 × refused: full" in text.getvalue()
    show(Console(file=text, width=200), ["h:1"], "m", runs[:2])
    assert "goodput at 90%: 4 or more requests/s" in text.getvalue()
    show(Console(file=text, width=200), ["h:1"], "m", [runs[2], runs[2]])
    assert "goodput at 90%: less than 8 requests/s" in text.getvalue()


def test_a_client_that_was_late_or_full_says_so() -> None:
    times = ClientTimes.of([0.001] * 98 + [0.3] * 2, [], 0.01, 0.2)
    assert times.was_the_bottleneck and times.turns_most == 0.3
    assert ClientTimes(0.001, 0.5, None, 0.95).was_the_bottleneck
    assert not ClientTimes.of([], [], 0.01, 0.5).was_the_bottleneck
    text = io.StringIO()
    late = Run("a load", 1.0, 10.0, [ok()], 1, 1, times)
    show(Console(file=text, width=200), ["h:1"], "m", [late])
    assert "the client was the bottleneck: its turns came 300.0 ms late" in text.getvalue()
    show(Console(file=text, width=200), ["h:1"], "m", [run(ok(moved=1 << 20), ok())])
    assert "1 of 2 were split over prefill and decode, each of which moved 1.0 MiB" in (
        text.getvalue()
    )


def test_requests_that_are_late_are_seen_among_any_number_of_turns() -> None:
    times = ClientTimes.of([0.0] * 100_000, [0.0, 0.0, 0.5], 0.01, 0.1)
    assert (times.turns_p99, times.turns_most) == (0.0, 0.0)
    assert times.was_the_bottleneck and times.requests_p99 is not None and times.requests_p99 > 0.4
    in_time = ClientTimes.of([0.0] * 100, [0.001] * 3, 0.01, 0.1)
    assert not in_time.was_the_bottleneck


def test_a_turn_counts_for_as_long_as_it_took() -> None:
    """One in 2,701, and a tenth of the time."""
    stalled = ClientTimes.of([0.0] * 2_700 + [3.0], [], 0.01, 0.1)
    assert stalled.turns_p99 == 3.0 and stalled.was_the_bottleneck
    # However long the others were in time.
    assert ClientTimes.of([0.0] * 1_000_000 + [3.0], [], 0.01, 0.1).was_the_bottleneck
    brief = ClientTimes.of([0.0] * 2_700 + [0.05], [], 0.01, 0.1)
    assert brief.turns_p99 == 0.0 and not brief.was_the_bottleneck


def test_a_request_is_judged_by_its_own_class() -> None:
    seen = [
        replace(ok(ttft=1.0), slo_class=slo_class)
        for slo_class in ("interactive", "standard", "standard", "batch")
    ]
    targets = {"interactive": Targets(0.5, 0.1), "standard": Targets(5.0, 0.1)}
    mixed = Run("a load", None, 10.0, seen, 1, 1, QUIET, targets)
    assert (mixed.with_targets, mixed.attained, mixed.attainment) == (3, 2, 2 / 3)
    assert mixed.values()["targets_seconds"]["standard"] == {"ttft": 5.0, "tpot": 0.1}
    text = io.StringIO()
    show(Console(file=text, width=200), ["h:1"], "m", [mixed])
    said = "66.7% of all 3 that have targets (1 have none) had interactive: TTFT ≤ 0.5 s"
    assert said in text.getvalue()


def test_no_goodput_comes_of_a_run_that_was_interrupted() -> None:
    runs = [run(ok(), rate=2.0), replace(run(ok(), rate=8.0), interrupted=True)]
    assert goodput(runs, 0.9) == 2.0
    assert goodput(runs[1:], 0.9) is None
    text = io.StringIO()
    show(Console(file=text, width=200), ["h:1"], "m", runs)
    assert "goodput at 90%: 2 or more requests/s" in text.getvalue()


def test_nothing_seen_is_a_report_all_the_same() -> None:
    quiet = ClientTimes.of([], [], 0.01, 0.0)
    nothing = Run("a load", None, 0.0, (), 0, 0, quiet, {"": TARGETS}, 3, True)
    json.dumps(values(["h:1"], "m", [nothing]), allow_nan=False)
    json.dumps(values(["h:1"], "m", [run(ok(), targets=Targets(math.inf, 1.0))]), allow_nan=False)
    text = io.StringIO()
    show(Console(file=text, width=200), ["h:1"], "m", [nothing])
    assert "interrupted after 0.0 s: 0 requests came" in text.getvalue()
    assert "3 under way were cut off and not counted" in text.getvalue()


def delta(offset: int, *tokens: int) -> bytes:
    message = inference_pb2.GenerateResponse()
    message.delta.offset = offset
    message.delta.token_ids.extend(tokens)
    return message.SerializeToString()


def completed(phase: str = "prefill_seconds", moved: int | None = None) -> bytes:
    message = inference_pb2.GenerateResponse()
    message.completed.usage.cached_prompt_tokens = 7
    report = message.completed.completions.add(ttft_seconds=0.3, tpot_seconds=0.02)
    setattr(report.phases, phase, 0.25)
    if moved is not None:
        report.handoff.bytes = moved
    return message.SerializeToString()


def test_a_stream_is_watched_token_by_token() -> None:
    meter = Meter(open=True)
    watch = Watch(0.0, 100, 5, meter)
    for message in (delta(0, 5), delta(1), delta(1, 6, 7, 8), delta(4, 9), completed(moved=64)):
        watch.saw(message)
    answered, wrong = watch.end()
    assert answered is not None and not wrong
    assert len(answered.gaps) == 4 and list(answered.gaps)[1:3] == [0.0, 0.0]
    assert answered.first + sum(answered.gaps) <= answered.e2e
    assert (answered.ttft, answered.tpot, answered.cached, answered.moved) == (0.3, 0.02, 7, 64)
    assert answered.phases[PHASES.index("prefill")] == 0.25
    assert (meter.prompt_tokens, meter.output_tokens) == (100, 5)


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ((delta(0, 1), completed()), "1 tokens came, not 2"),
        ((delta(0, 1), delta(2, 2), completed()), "lost or repeated"),
        ((delta(0, 1, 2),), "without its report"),
        ((b"\xff", delta(0, 1, 2), completed()), "could not be read"),
        ((), "without its report"),
    ],
)
def test_a_stream_that_is_not_what_was_asked_for_has_failed(
    messages: tuple[bytes, ...], wrong: str
) -> None:
    meter = Meter()
    watch = Watch(0.0, 10, 2, meter)
    for message in messages:
        watch.saw(message)
    answered, said = watch.end()
    assert answered is None and wrong in said
    assert meter.output_tokens == 0  # it was not open


def test_requests_ask_for_exact_lengths_and_for_targets_where_those_are_finite() -> None:
    made = request_of("m", [1, 2], 5, "batch", "salt", Targets(0.5, math.inf))
    assert (made.sampling.max_tokens, made.sampling.ignore_eos) == (5, True)
    assert made.slo_class == inference_pb2.GenerateRequest(slo_class="SLO_CLASS_BATCH").slo_class
    assert made.targets.ttft_seconds == 0.5 and not made.targets.HasField("tpot_seconds")
    assert not request_of("m", [1], 5, "standard", "s", None).HasField("targets")


def test_a_refusal_says_when_to_come_back() -> None:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.seconds, info.retry_delay.nanos = 2, 500_000_000
    packed = AnyMessage()
    packed.Pack(info)
    status = status_pb2.Status(code=8, details=[packed]).SerializeToString()
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert bench_client._retry_seconds(CallFailed(full, "full", status)) == 2.5
    assert bench_client._retry_seconds(CallFailed(full, "full")) == 0.0
    assert bench_client._retry_seconds(CallFailed(full, "full", b"\xff")) == 0.0
