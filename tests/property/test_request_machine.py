"""The request machine against workers that answer, stall and die in any order.

After any history: a request has at most one terminal effect and nothing follows it; each
completion's offsets have no gap and no repetition, and its tokens are those of one engine, through
workers that are lost at any token, and through giving way to other work; a
sequence that was started has ended on its worker, or was cancelled there, once the request is over.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.errors import EngineFailed, InvalidRequest, Unavailable
from cluster.ids import RequestId
from router.events import (
    Abort,
    Admitted,
    Cancel,
    CancelSequence,
    Complete,
    Deadline,
    Emit,
    Event,
    Fail,
    GiveWay,
    Output,
    Place,
    Placed,
    Started,
    StartSequence,
    WorkerFailed,
)
from router.generation import Generation, Sampling
from router.output import Delta, FinishReason, Stage, WorkerReport
from router.placement import Plan, Target
from router.request import Request
from router.states import TERMINAL

ERRORS = (
    Unavailable("worker lost"),
    EngineFailed("out of memory"),
    InvalidRequest("", "no such grammar"),
)


@dataclass
class Sequence:
    """A sequence on a worker: what it has sent of the completion's tokens, from `base` on."""

    index: int
    stage: Stage
    sequence_id: str
    base: int
    sent: int


class Truth:
    """What one engine would generate for a completion: a token and a character or two each."""

    def __init__(self, index: int, length: int, finish: FinishReason) -> None:
        self.tokens = [100 * index + i for i in range(length)]
        self.texts = [chr(97 + i % 26) * (1 + i % 2) for i in range(length)]
        self.finish = finish

    def output(self, sequence: Sequence, count: int) -> Output:
        """The next `count` tokens of `sequence`."""
        start = sequence.sent
        end = min(start + count, len(self.tokens))
        last = end == len(self.tokens)
        finish = self.finish if last else None
        if sequence.stage is Stage.PREFILL and not last:
            finish = FinishReason.LENGTH
        sequence.sent = end
        return Output(
            sequence.sequence_id,
            sequence.stage,
            start - sequence.base,
            tuple(self.tokens[start:end]),
            "".join(self.texts[start:end]),
            finish=finish,
            report=WorkerReport(0.4, 0.3, 0.2, 0.1, 0.0) if finish else None,
        )


class RequestMachine(RuleBasedStateMachine):
    """Rules are what may happen; invariants what must hold."""

    @initialize(
        lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
        max_tokens=st.integers(1, 6),
        seed=st.none() | st.integers(0, 9),
        penalty=st.none() | st.just(0.5),
        greedy=st.booleans(),
    )
    def begin(
        self,
        lengths: list[int],
        max_tokens: int,
        seed: int | None,
        penalty: float | None,
        greedy: bool,
    ) -> None:
        sampling = Sampling(
            max_tokens=max_tokens,
            n=len(lengths),
            seed=seed,
            temperature=0.0 if greedy else 1.0,
            presence_penalty=penalty,
        )
        self.exact = sampling.replayable or not penalty
        generation = Generation(RequestId("r"), "m", (1, 2, 3), sampling, "", 0.0, 1e9)
        self.request = Request(generation)
        self.truths = [
            Truth(
                i,
                min(length, max_tokens),
                FinishReason.STOP if length < max_tokens else FinishReason.LENGTH,
            )
            for i, length in enumerate(lengths)
        ]
        self.now = 0.0
        self.max_tokens = max_tokens
        self.placing: list[Place] = []
        self.bases: dict[str, int] = {}
        self.on_workers: dict[tuple[str, Stage], Sequence] = {}
        self.deltas: dict[int, list[Delta]] = {i: [] for i in range(len(lengths))}
        self.ends: list[Complete | Fail] = []

    def step(self, event: Event, index: int | None = None) -> None:
        self.now += 0.125
        for effect in self.request.step(self.now, event, index):
            assert not self.ends, "an effect after the end"
            match effect:
                case Place():
                    self.placing.append(effect)
                case StartSequence(at, _, stage, sequence_id):
                    base = self.bases[sequence_id]
                    sequence = Sequence(at, stage, sequence_id, base, base)
                    self.on_workers[sequence_id, stage] = sequence
                case CancelSequence(worker, sequence_id):
                    self.on_workers.pop((sequence_id, Stage(worker.worker_id.split("-")[0])), None)
                case Emit(delta):
                    self.deltas[delta.index].append(delta)
                case Complete() | Fail():
                    self.ends.append(effect)

    @rule()
    def admit(self) -> None:
        if self.request.state == "received":
            self.step(Admitted())

    @precondition(lambda self: self.placing)
    @rule(data=st.data(), whole=st.booleans())
    def place(self, data: st.DataObject, whole: bool) -> None:
        place = self.placing.pop(data.draw(st.integers(0, len(self.placing) - 1)))
        plan = Plan(prefill=Target("prefill-0", "x"), decode=Target("decode-0", "x"))
        base = len(place.prefix)
        assert place.prefix == tuple(self.truths[place.index].tokens[:base])
        if self.max_tokens == base + 1:
            plan = Plan(prefill=Target("prefill-0", "x"))
        elif whole:
            plan = Plan(whole=Target("whole-0", "x"))
        sequence_id = f"r/{place.index}.{place.attempt}"
        self.bases[sequence_id] = base
        self.step(Placed(plan, sequence_id, b"t", base, place.attempt), place.index)
        self.step(Started(), place.index)

    def some_sequence(self, data: st.DataObject) -> Sequence:
        keys = sorted(self.on_workers)
        return self.on_workers[keys[data.draw(st.integers(0, len(keys) - 1))]]

    @precondition(lambda self: self.on_workers)
    @rule(data=st.data(), count=st.integers(1, 3))
    def answer(self, data: st.DataObject, count: int) -> None:
        sequence = self.some_sequence(data)
        truth = self.truths[sequence.index]
        output = truth.output(sequence, 1 if sequence.stage is Stage.PREFILL else count)
        if output.finish is not None:
            del self.on_workers[sequence.sequence_id, sequence.stage]
        self.step(output, sequence.index)

    @precondition(lambda self: self.on_workers)
    @rule(data=st.data(), error=st.sampled_from(ERRORS))
    def fail(self, data: st.DataObject, error: Unavailable) -> None:
        sequence = self.some_sequence(data)
        del self.on_workers[sequence.sequence_id, sequence.stage]
        self.step(WorkerFailed(sequence.sequence_id, sequence.stage, error), sequence.index)

    @rule(chance=st.integers(0, 2))
    def give_way(self, chance: int) -> None:
        if chance == 0:
            self.step(GiveWay())
            assert self.request.ended or self.request.state == "received"

    @rule()
    def stale(self) -> None:
        self.step(Output("r/0.99", Stage.DECODE, 0, (55,), "?"), 0)
        self.step(WorkerFailed("r/0.99", Stage.PREFILL, ERRORS[0]), 0)

    @rule(end=st.sampled_from((Cancel(), Deadline(), Abort(ERRORS[0]))), chance=st.integers(0, 5))
    def give_up(self, end: Event, chance: int) -> None:
        if chance == 0:
            self.step(end)

    @invariant()
    def one_end(self) -> None:
        assert len(self.ends) == int(self.request.ended)

    @invariant()
    def it_ends_in_an_error_only_for_a_reason(self) -> None:
        """A worker that is lost now and then is no reason, unless going on would not be exact."""
        for end in self.ends:
            if isinstance(end, Fail) and "cannot go on exactly" in str(end.error):
                assert not self.exact

    @invariant()
    def nothing_is_left_on_workers(self) -> None:
        if self.request.ended:
            assert not self.on_workers

    @invariant()
    def something_can_go_on(self) -> None:
        if self.request.ended or self.request.state == "received":
            return
        for completion in self.request.completions:
            waits = [s for s in self.on_workers.values() if s.index == completion.index]
            waits += [p for p in self.placing if p.index == completion.index]
            assert waits or completion.state in TERMINAL

    @invariant()
    def tokens_are_those_of_one_engine(self) -> None:
        for index, deltas in self.deltas.items():
            tokens: list[int] = []
            for delta in deltas:
                assert delta.offset == len(tokens)
                assert not tokens or delta is deltas[0] or deltas[0].finish is None
                tokens += delta.token_ids
            truth = self.truths[index]
            assert tokens == truth.tokens[: len(tokens)]
            text = "".join(delta.text for delta in deltas)
            assert "".join(truth.texts).startswith(text)

    @invariant()
    def a_success_is_complete(self) -> None:
        for end in self.ends:
            if not isinstance(end, Complete):
                continue
            for report in end.completed.completions:
                truth, deltas = self.truths[report.index], self.deltas[report.index]
                assert report.tokens == len(truth.tokens)
                assert [d.finish for d in deltas if d.finish] == [truth.finish]
                assert deltas[-1].finish
                phases = asdict(report.phases).values()
                assert min(phases) >= 0
                assert sum(phases) <= self.now
            assert end.completed.completion_tokens == sum(len(t.tokens) for t in self.truths)


TestRequestMachine = RequestMachine.TestCase
TestRequestMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
