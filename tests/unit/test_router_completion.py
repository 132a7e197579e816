"""One completion through its states: both orders of the two workers' messages, retries, ends."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PdserveError,
    Unavailable,
    status_of,
)
from router.completion import MAX_RETRIES
from router.events import (
    Abort,
    Admitted,
    Cancel,
    Deadline,
    Event,
    Fail,
    GiveWay,
    Output,
    Place,
    StartSequence,
)
from router.generation import Guide, Sampling
from router.output import Delta, Stage
from router.placement import Plan
from router.states import State
from tests.unit.completions import (
    LENGTH,
    LOST,
    STOP,
    Bench,
    D,
    P,
    cancelled,
    error_of,
    report_of,
)


def test_states_of_an_ordinary_completion() -> None:
    bench = Bench()
    assert bench.machine.state is State.RECEIVED
    assert bench.step(Admitted()) == [Place(0, 0)]
    assert bench.machine.state is State.ADMITTED
    started = bench.place()
    assert [(e.worker, e.stage) for e in started if isinstance(e, StartSequence)] == [
        (P, Stage.PREFILL),
        (D, Stage.DECODE),
    ]
    assert bench.machine.state is State.PREFILLING
    bench.prefill()
    assert bench.machine.state is State.FIRST_TOKEN
    assert bench.decode(0, 7, text="he") == []
    assert bench.machine.state is State.FIRST_TOKEN
    bench.decode(1, 8, text="l")
    assert bench.machine.state is State.DECODING
    effects = bench.decode(2, 9, text="lo", finish=STOP)
    assert bench.machine.state is State.FINISHED
    assert cancelled(effects) == set()
    report = report_of(effects)
    assert (report.prefill_worker, report.decode_worker) == ("p-0", "d-0")
    assert (report.tokens, report.cached_prompt_tokens) == (3, 3)
    assert report.handoff is not None and report.handoff.bytes == 10
    assert (bench.tokens, bench.text) == ([7, 8, 9], "hello")
    assert [d.offset for d in bench.deltas] == [0, 1, 2]


def test_decode_before_prefill() -> None:
    bench = Bench()
    bench.place()
    bench.decode(0, 7, text="he")
    bench.decode(1, 8, text="l")
    assert bench.prefill(text="he") == []
    bench.decode(2, 9, text="lo", finish=LENGTH)
    assert (bench.tokens, bench.text) == ([7, 8, 9], "hello")


def test_decode_ends_before_prefill_was_heard() -> None:
    bench = Bench()
    bench.place()
    effects = bench.decode(0, 7, 8, text="hel", finish=STOP)
    assert cancelled(effects) == {"p-0"}
    assert report_of(effects).tokens == 2
    assert bench.prefill() == []


def test_text_that_lags_its_token_is_sent_once() -> None:
    bench = Bench()
    bench.place()
    bench.prefill(text="he")
    assert bench.decode(0, 7) == []
    bench.decode(1, 8, text="hell")
    bench.decode(2, 9, text="o", finish=STOP)
    assert [d.text for d in bench.deltas] == ["he", "ll", "o"]


def test_first_token_ends_it() -> None:
    bench = Bench()
    bench.place()
    effects = bench.prefill(finish=STOP)
    assert cancelled(effects) == {"d-0"}
    assert report_of(effects).decode_worker == ""
    assert bench.deltas[-1].finish is STOP


def test_first_token_ends_it_after_decode_had_sent_it() -> None:
    bench = Bench()
    bench.place()
    bench.decode(0, 7, text="h")
    effects = bench.prefill(text="he", finish=STOP)
    assert cancelled(effects) == {"d-0"}
    assert (bench.tokens, bench.text, bench.deltas[-1].finish) == ([7], "he", STOP)


def test_one_token_needs_no_decode() -> None:
    bench = Bench(Sampling(max_tokens=1))
    started = bench.place(Plan(prefill=P))
    assert [e.stage for e in started if isinstance(e, StartSequence)] == [Stage.PREFILL]
    effects = bench.prefill(finish=LENGTH)
    assert report_of(effects).phases.decode == 0
    assert bench.deltas[-1].finish is LENGTH


def test_whole_on_one_worker() -> None:
    bench = Bench()
    bench.place(Plan(whole=P))
    bench.decode(0, 7, text="he", stage=Stage.WHOLE)
    assert bench.machine.state is State.FIRST_TOKEN
    effects = bench.decode(1, 8, text="l", finish=STOP, stage=Stage.WHOLE)
    report = report_of(effects)
    assert (report.prefill_worker, report.decode_worker) == ("p-0", "p-0")
    assert report.phases.handoff_wait == report.phases.decode_queue == 0


@pytest.mark.parametrize("decode_first", [False, True])
def test_a_sent_token_is_never_contradicted(decode_first: bool) -> None:
    bench = Bench()
    bench.place()
    if decode_first:
        bench.decode(0, 7, text="he")
        effects = bench.prefill(token=6)
    else:
        bench.prefill(token=6)
        effects = bench.decode(0, 7, text="he")
    assert status_of(error_of(effects)).name == "INTERNAL"
    assert "d-0" in cancelled(effects)
    assert len(bench.tokens) == 1


@pytest.mark.parametrize(
    "offset, tokens, text",
    [(0, (7,), "ha"), (1, (8,), ""), (5, (7,), "")],
    ids=["text", "first token skipped", "gap"],
)
def test_output_out_of_place_fails(offset: int, tokens: tuple[int, ...], text: str) -> None:
    bench = Bench()
    bench.place()
    bench.prefill(text="he")
    assert status_of(error_of(bench.decode(offset, *tokens, text=text))).name == "INTERNAL"


def test_prefill_that_sends_two_tokens_fails() -> None:
    bench = Bench()
    bench.place()
    effects = bench.step(Output(bench.sequence, Stage.PREFILL, 0, (7, 8), "he", finish=LENGTH))
    assert status_of(error_of(effects)).name == "INTERNAL"


@pytest.mark.parametrize("stage, other", [(Stage.PREFILL, "d-0"), (Stage.DECODE, "p-0")])
def test_retry_before_the_first_token(stage: Stage, other: str) -> None:
    bench = Bench(Sampling(max_tokens=8))
    bench.place()
    failed = "p-0" if stage is Stage.PREFILL else "d-0"
    effects = bench.fails(stage)
    if stage is Stage.DECODE:
        assert effects == []
        assert bench.machine.state is State.PREFILLING
        effects = bench.prefill()
        other = ""  # prefill has ended by itself
    assert cancelled(effects) == ({other} if other else set())
    assert effects[-1] == Place(0, 1, frozenset({failed}), 0.0)
    assert bench.deltas == []
    assert bench.machine.state is State.ADMITTED
    old = bench.sequence
    bench.place()
    assert bench.step(Output(old, Stage.PREFILL, 0, (5,), "x", finish=LENGTH)) == []
    bench.prefill()
    bench.decode(0, 7, 8, text="hey", finish=STOP)
    assert (bench.tokens, bench.text) == ([7, 8], "hey")


def test_retries_are_counted() -> None:
    bench = Bench()
    for _ in range(MAX_RETRIES):
        bench.place()
        assert isinstance(bench.fails(Stage.PREFILL)[-1], Place)
    bench.place()
    assert error_of(bench.fails(Stage.PREFILL)) is LOST


@pytest.mark.parametrize("first_sent", [False, True])
def test_decode_that_gives_up_because_prefill_ended_it_is_no_failure(first_sent: bool) -> None:
    bench = Bench(Sampling(max_tokens=8, temperature=1))
    bench.place()
    if first_sent:
        bench.decode(0, 7, text="he")
    assert bench.fails(Stage.DECODE) == []
    effects = bench.prefill(finish=STOP)
    assert report_of(effects).decode_worker == ""
    assert cancelled(effects) == set()
    assert (bench.tokens, bench.text, bench.deltas[-1].finish) == ([7], "he", STOP)


def test_both_workers_failed() -> None:
    bench = Bench(Sampling(max_tokens=8, temperature=1))
    bench.place()
    assert bench.fails(Stage.DECODE) == []
    effects = bench.fails(Stage.PREFILL)
    assert effects == [Place(0, 1, frozenset({"p-0", "d-0"}), 0.0)]


def test_prefill_that_cannot_be_retried_decides() -> None:
    bench = Bench()
    bench.place()
    bench.fails(Stage.DECODE)
    error = InvalidRequest("", "the grammar is wrong")
    assert error_of(bench.fails(Stage.PREFILL, error)) is error


def test_a_decode_failure_that_waits_is_told_when_there_is_no_retry() -> None:
    bench = Bench(Sampling(max_tokens=8, temperature=1, presence_penalty=0.5))
    bench.place()
    bench.decode(0, 7, text="he")
    assert bench.fails(Stage.DECODE) == []
    error = error_of(bench.prefill())
    assert isinstance(error, Unavailable)
    assert "d-0" in str(error) and "1 tokens" in str(error)


@pytest.mark.parametrize("event", [Cancel(), Deadline()])
def test_a_wait_for_prefill_can_be_ended(event: Event) -> None:
    bench = Bench()
    bench.place()
    bench.fails(Stage.DECODE)
    effects = bench.step(event)
    assert cancelled(effects) == {"p-0"}
    error_of(effects)


def test_retry_after_the_first_token_sends_it_once() -> None:
    bench = Bench(Sampling(max_tokens=8, seed=1))
    bench.place()
    bench.prefill()
    assert isinstance(bench.fails(Stage.DECODE)[-1], Place)
    bench.place()
    assert bench.prefill() == []
    effects = bench.decode(0, 7, 8, text="hel", finish=STOP)
    assert (bench.tokens, bench.text) == ([7, 8], "hel")
    assert report_of(effects).ttft_seconds == 2.0


def test_retry_that_draws_another_first_token_fails() -> None:
    bench = Bench()
    bench.place()
    bench.prefill(token=7)
    bench.fails(Stage.DECODE)
    bench.place()
    assert status_of(error_of(bench.prefill(token=8))).name == "INTERNAL"


def test_it_continues_after_the_tokens_that_were_sent() -> None:
    bench = Bench(Sampling(max_tokens=8, temperature=1))
    bench.place()
    bench.decode(0, 7, 8, 9, text="hell")
    bench.prefill()
    (place,) = bench.fails(Stage.DECODE)
    assert place == Place(0, 1, frozenset({"d-0"}), 0.0, (7, 8, 9))
    bench.place(base=3)
    # Workers count from 0 again; prefill's LENGTH is its clamp to one token.
    assert [e.delta for e in bench.prefill(token=5, text="o")] == [
        Delta(0, 3, (5,), "o", text_offset=4)
    ]
    assert bench.decode(0, 5, text="o") == []
    effects = bench.decode(1, 6, text="!", finish=STOP)
    assert (bench.tokens, bench.text) == ([7, 8, 9, 5, 6], "hello!")
    report = report_of(effects)
    assert (report.tokens, report.cached_prompt_tokens) == (5, 3)  # of the first prefill


def test_one_token_that_is_left_is_prefills() -> None:
    bench = Bench(Sampling(max_tokens=3, temperature=1))
    bench.place()
    bench.decode(0, 7, 8, text="he")
    bench.prefill()
    bench.fails(Stage.DECODE)
    bench.place(Plan(prefill=P), base=2)
    assert report_of(bench.prefill(token=5, text="y")).decode_worker == ""
    assert (bench.tokens, bench.text) == ([7, 8, 5], "hey")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=8, temperature=1, seed=1),
        Sampling(max_tokens=8, temperature=0, presence_penalty=0.5),
        Sampling(max_tokens=8, temperature=0, stop=("x",)),
        Sampling(max_tokens=8, temperature=0, guide=Guide("regex", "h.*")),
    ],
    ids=["seed", "penalty", "stop", "guide"],
)
def test_what_an_engine_keeps_is_built_up_again(sampling: Sampling) -> None:
    """All is generated anew, compared with what was sent, and goes on behind it."""
    bench = Bench(sampling)
    bench.place()
    bench.decode(0, 7, 8, text="he")
    bench.prefill()
    (place,) = bench.fails(Stage.DECODE)
    assert isinstance(place, Place) and place.prefix == ()
    bench.place()
    assert bench.prefill() == []
    assert bench.decode(0, 7, text="he") == []
    bench.decode(1, 8, 9, text="y", finish=STOP)
    assert (bench.tokens, bench.text) == ([7, 8, 9], "hey")


def test_other_tokens_the_second_time_are_an_error_and_never_sent() -> None:
    bench = Bench(Sampling(max_tokens=8, temperature=1, seed=1))
    bench.place()
    bench.decode(0, 7, 8, text="he")
    bench.prefill()
    bench.fails(Stage.DECODE)
    bench.place()
    bench.prefill()
    error = error_of(bench.decode(0, 7, 6, text="hi"))
    assert isinstance(error, Unavailable) and "same tokens" in str(error)
    assert bench.tokens == [7, 8]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"presence_penalty": 0.5}, "presence"),
        ({"frequency_penalty": -0.5}, "frequency"),
        ({"stop": ("x",)}, "stop strings"),
        ({"guide": Guide("json_object")}, "guide"),
    ],
)
def test_what_cannot_go_on_exactly_says_why(fields: dict[str, Any], word: str) -> None:
    bench = Bench(Sampling(max_tokens=8, temperature=1, **fields))
    bench.place()
    bench.decode(0, 7, 8, text="he")
    bench.prefill()
    error = error_of(bench.fails(Stage.DECODE))
    assert isinstance(error, Unavailable)
    assert "2 tokens" in str(error) and word in str(error) and "without a seed" in str(error)


def test_half_a_character_is_not_continued() -> None:
    for temperature in (0, 1):
        bench = Bench(Sampling(max_tokens=8, temperature=temperature), settled=lambda _: False)
        bench.place()
        bench.decode(0, 7, 8, text="he")
        bench.prefill()
        last = bench.fails(Stage.DECODE)[-1]
        if temperature == 0:
            assert last == Place(0, 1, frozenset({"d-0"}))
        else:
            assert isinstance(last, Fail)


def test_a_long_answer_may_outlive_many_workers() -> None:
    bench = Bench(Sampling(max_tokens=99, temperature=1))
    for i in range(3 * MAX_RETRIES):
        bench.place(Plan(whole=D), base=i)
        bench.decode(0, 7, text="x", stage=Stage.WHOLE)
        assert isinstance(bench.fails(Stage.WHOLE)[-1], Place)
    for _ in range(MAX_RETRIES - 1):
        bench.place(Plan(whole=D), base=3 * MAX_RETRIES)
        assert isinstance(bench.fails(Stage.WHOLE)[-1], Place)
    bench.place(Plan(whole=D), base=3 * MAX_RETRIES)
    assert f"{3 * MAX_RETRIES} tokens" in str(error_of(bench.fails(Stage.WHOLE)))


def test_it_gives_way_and_goes_on_when_it_is_admitted_again() -> None:
    bench = Bench(Sampling(max_tokens=8, temperature=1))
    bench.place()
    bench.decode(0, 7, 8, text="he")
    assert cancelled(bench.step(GiveWay())) == {"p-0", "d-0"}
    assert bench.machine.state is State.RECEIVED
    assert bench.decode(2, 9, text="?") == []
    assert bench.step(Admitted()) == [Place(0, 1, frozenset(), 0.0, (7, 8))]
    bench.place(base=2)
    bench.prefill(token=9, text="y", finish=STOP)
    assert (bench.tokens, bench.text) == ([7, 8, 9], "hey")


def test_prefill_lost_after_decode_took_over_is_nothing() -> None:
    bench = Bench()
    bench.place()
    bench.decode(0, 7, text="he")
    assert bench.fails(Stage.PREFILL) == []
    assert report_of(bench.decode(1, 8, text="l", finish=STOP)).tokens == 2


def test_what_is_not_retryable_fails_at_once() -> None:
    bench = Bench()
    bench.place()
    error = InvalidRequest("", "the grammar is wrong")
    effects = bench.fails(Stage.PREFILL, error)
    assert error_of(effects) is error
    assert cancelled(effects) == {"d-0"}


REACH = ["received", "admitted", "prefilling", "first token", "decoding"]


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize(
    "event, kind, state",
    [
        (Cancel(), Cancelled, State.CANCELLED),
        (Deadline(), DeadlineExceeded, State.FAILED),
        (Abort(Overloaded("slow")), Overloaded, State.FAILED),
    ],
)
def test_the_end_from_every_state(
    reach: str, event: Event, kind: type[PdserveError], state: State
) -> None:
    bench = Bench()
    progress = REACH.index(reach)
    if progress == 1:
        bench.step(Admitted())
    if progress >= 2:
        bench.place()
    if progress >= 3:
        bench.prefill()
    if progress >= 4:
        bench.decode(0, 7, 8, text="hel")
    effects = bench.step(event)
    assert isinstance(error_of(effects), kind)
    assert bench.machine.state is state
    expected = [set(), set(), {"p-0", "d-0"}, {"d-0"}, {"d-0"}][progress]
    assert cancelled(effects) == expected
    assert bench.step(event) == []
    assert bench.decode(2, 9) == []


def test_phases_add_up() -> None:
    bench = Bench()
    bench.place()  # 101
    bench.prefill()  # 102, scheduled 0.25 before
    bench.decode(0, 7, text="he")  # 103
    bench.decode(1, 8, text="l")  # 104
    report = report_of(bench.decode(2, 9, text="lo", finish=STOP))  # 105, landed 102.5
    assert asdict(report.phases) == {
        "queue": 1.0,
        "prefill_queue": 0.75,
        "prefill": 0.25,
        "handoff_wait": 0.5,
        "decode_queue": 0.25,
        "first_step": 0.75,
        "decode": 1.5,
    }
    assert sum(asdict(report.phases).values()) == 5.0
    assert (report.ttft_seconds, report.tpot_seconds) == (2.0, 1.5)
