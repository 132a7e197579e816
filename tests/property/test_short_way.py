"""The short way of a plain token changes nothing: machines that take it or not say the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.ids import RequestId
from router.events import Admitted, Effect, Emit, Output, Placed, Started
from router.generation import Generation, Sampling
from router.output import Delta, FinishReason, Stage
from router.placement import Plan, Target
from router.request import Request

PAIR = Plan(prefill=Target("p", "a"), decode=Target("d", "b"))
WHOLE = Plan(whole=Target("w", "c"))
LENGTH = FinishReason.LENGTH
TOKENS = 12


def request(plan: Plan) -> Request:
    sampling = Sampling(max_tokens=TOKENS, temperature=0)
    machine = Request(Generation(RequestId("r"), "m", (1, 2), sampling, "", 0.0, 100.0))
    machine.step(0.0, Admitted())
    machine.step(0.0, Placed(plan, "s", b""), 0)
    machine.step(0.0, Started(), 0)
    return machine


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Plan, list[Output]]:
    """Of a run that may go wrong: tokens that are skipped, repeated or others, text that lags."""
    plan = draw(st.sampled_from([PAIR, WHOLE]))
    stage = Stage.WHOLE if plan is WHOLE else Stage.DECODE
    events, offset = [], 0
    if plan is PAIR:
        events.append(Output("s", Stage.PREFILL, 0, (0,), "a", finish=LENGTH))
    while offset < TOKENS:
        count = draw(st.integers(1, 4))
        tokens = tuple(range(offset, min(TOKENS, offset + count)))
        text = draw(st.sampled_from(["", "a" * len(tokens), "ab"]))
        slip = draw(st.sampled_from([0] * 12 + [-1, 1]))
        end = LENGTH if offset + len(tokens) >= TOKENS else None
        sequence = draw(st.sampled_from(["s"] * 15 + ["of another attempt"]))
        events.append(Output(sequence, stage, max(0, offset + slip), tokens, text, finish=end))
        offset += len(tokens)
    if draw(st.booleans()) and plan is PAIR:
        place = draw(st.integers(0, len(events)))
        events.insert(place, events.pop(0))
    return plan, events


@given(outputs())
def test_the_short_way_changes_nothing(run: tuple[Plan, list[Output]]) -> None:
    plan, events = run
    long, short = request(plan), request(plan)
    said: list[list[Effect]] = [[], []]
    for now, event in enumerate(events, 1):
        said[0] += long.step(float(now), event, 0)
        delta = short.more(float(now), event, 0)
        if delta is None:
            said[1] += short.step(float(now), event, 0)
        else:
            said[1].append(Emit(delta))
    assert [_plain(e) for e in said[0]] == [_plain(e) for e in said[1]]
    assert (long.state, long.tokens) == (short.state, short.tokens)


def test_it_is_taken() -> None:
    machine = request(PAIR)
    machine.step(1.0, Output("s", Stage.PREFILL, 0, (0,), "a", finish=LENGTH), 0)
    assert machine.more(2.0, Output("s", Stage.DECODE, 0, (0,), "a"), 0) is None
    machine.step(2.0, Output("s", Stage.DECODE, 0, (0,), "a"), 0)
    assert machine.more(3.0, Output("s", Stage.DECODE, 1, (1,), "b"), 0) is None
    machine.step(3.0, Output("s", Stage.DECODE, 1, (1,), "b"), 0)
    got = machine.more(4.0, Output("s", Stage.DECODE, 2, (2, 3), "cd"), 0)
    assert got == Delta(0, 2, (2, 3), "cd", text_offset=2)
    assert machine.more(5.0, Output("s", Stage.DECODE, 4, (4,), "e", finish=LENGTH), 0) is None


def _plain(effect: Effect) -> str:
    return repr(effect)
