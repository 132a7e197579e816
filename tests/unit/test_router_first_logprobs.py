"""The first token's logprobs are prefill's to tell: decode, which repeats the token, has none."""

from __future__ import annotations

import math

import pytest

from cluster.errors import PdserveError, Unavailable
from router.events import Cancel, CancelSequence, Place
from router.generation import Sampling
from router.output import Stage
from router.placement import Plan
from router.states import State
from tests.unit.completions import LENGTH, LOST, STOP, Bench, D, cancelled, error_of, logprobs

UNKNOWN = math.nan


@pytest.fixture
def bench() -> Bench:
    made = Bench(Sampling(max_tokens=8, temperature=0, logprobs=0))
    made.place()
    return made


def told(bench: Bench) -> list[float]:
    return [entry.sampled.logprob for delta in bench.deltas for entry in delta.logprobs]


def test_decode_that_is_sooner_waits_for_prefill(bench: Bench) -> None:
    assert bench.decode(0, 7, 8, text="hel", logprobs=logprobs(UNKNOWN, -2.0)) == []
    assert bench.decode(2, 9, text="l", logprobs=logprobs(-3.0)) == []
    assert bench.machine.state is State.PREFILLING
    bench.prefill(text="he", logprobs=logprobs(-1.0))
    assert bench.machine.state is State.DECODING
    bench.decode(3, 10, text="o", logprobs=logprobs(-4.0), finish=LENGTH)
    assert (bench.tokens, bench.text) == ([7, 8, 9, 10], "hello")
    assert told(bench) == [-1.0, -2.0, -3.0, -4.0]


def test_decode_that_has_ended_waits_too(bench: Bench) -> None:
    assert bench.decode(0, 7, 8, logprobs=logprobs(UNKNOWN, -2.0), finish=STOP) == []
    bench.prefill(logprobs=logprobs(-1.0))
    assert bench.machine.state is State.FINISHED
    assert told(bench) == [-1.0, -2.0]


def test_behind_prefill_nothing_waits(bench: Bench) -> None:
    bench.prefill(logprobs=logprobs(-1.0))
    bench.decode(0, 7, 8, logprobs=logprobs(UNKNOWN, -2.0))
    assert told(bench) == [-1.0, -2.0]


def test_prefill_that_is_lost_before_it_told_them_is_asked_again(bench: Bench) -> None:
    bench.decode(0, 7, 8, logprobs=logprobs(UNKNOWN, -2.0))
    effects = bench.fails(Stage.PREFILL)
    assert cancelled(effects) == {"d-0"}
    assert [e.avoid for e in effects if isinstance(e, Place)] == [{"p-0"}]
    bench.place()
    bench.prefill(logprobs=logprobs(-1.0))
    bench.decode(0, 7, 8, logprobs=logprobs(UNKNOWN, -2.0))
    assert (bench.tokens, told(bench)) == ([7, 8], [-1.0, -2.0])


@pytest.mark.parametrize("failed", [LOST, Unavailable("its cache is full")])
def test_decode_that_fails_while_it_waits_is_tried_again(
    bench: Bench, failed: PdserveError
) -> None:
    bench.decode(0, 7, 8, logprobs=logprobs(UNKNOWN, -2.0))
    assert bench.fails(Stage.DECODE, failed) == []
    effects = bench.prefill(logprobs=logprobs(-1.0))
    assert [e.avoid for e in effects if isinstance(e, Place)] == [{"d-0"}]
    assert bench.tokens == []


def test_what_waits_is_dropped_with_its_request(bench: Bench) -> None:
    bench.decode(0, 7, 8, logprobs=logprobs(UNKNOWN, -2.0))
    effects = bench.step(Cancel())
    assert len([e for e in effects if isinstance(e, CancelSequence)]) == 2
    assert bench.prefill(logprobs=logprobs(-1.0)) == []
    assert bench.tokens == []


def test_without_logprobs_whichever_is_sooner_is_sent() -> None:
    bench = Bench()
    bench.place()
    bench.decode(0, 7, 8)
    assert bench.tokens == [7, 8]


def test_a_worker_that_has_them_from_nobody_is_an_error() -> None:
    whole = Bench(Sampling(max_tokens=8, temperature=0, logprobs=0))
    whole.place(Plan(whole=D))
    effects = whole.decode(0, 7, stage=Stage.WHOLE, logprobs=logprobs(UNKNOWN))
    assert "logprobs" in str(error_of(effects))
    assert whole.tokens == []
