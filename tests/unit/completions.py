"""A completion on a table, for the tests of its machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.errors import PdserveError, Unavailable
from router.completion import Completion
from router.events import (
    Admitted,
    CancelSequence,
    Effect,
    Emit,
    Event,
    Fail,
    Finish,
    Output,
    Placed,
    Started,
    WorkerFailed,
)
from router.generation import Sampling
from router.output import (
    CompletionReport,
    Delta,
    FinishReason,
    Handoff,
    Logprob,
    Stage,
    TokenLogprobs,
    WorkerReport,
)
from router.placement import Plan, Target
from router.states import State

P, D = Target("p-0", "a"), Target("d-0", "b")
PAIR = Plan(prefill=P, decode=D)
LOST = Unavailable("worker d-0 was lost")
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


class Bench:
    """A completion on a table: one call per event, time as told."""

    def __init__(
        self,
        sampling: Sampling | None = None,
        settled: Callable[[Sequence[int]], bool] = lambda _: True,
    ) -> None:
        sampling = sampling or Sampling(max_tokens=8, temperature=0)
        self.machine = Completion(0, sampling, 100.0, settled)
        self.now = 100.0
        self.attempt = -1
        self.deltas: list[Delta] = []

    def step(self, event: Event, after: float = 1.0) -> list[Effect]:
        self.now += after
        effects = self.machine.step(self.now, event)
        self.deltas += [e.delta for e in effects if isinstance(e, Emit)]
        return effects

    def place(self, plan: Plan = PAIR, base: int = 0) -> list[Effect]:
        if self.machine.state is State.RECEIVED:
            self.step(Admitted(), 0)
        self.attempt += 1
        effects = self.step(Placed(plan, self.sequence, b"ticket", base))
        self.step(Started(), 0)
        return effects

    @property
    def sequence(self) -> str:
        return f"r/0.{self.attempt}.n"

    def prefill(
        self,
        token: int = 7,
        text: str = "he",
        finish: FinishReason = LENGTH,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> list[Effect]:
        report = WorkerReport(scheduled_ago=0.25, cached_prompt_tokens=3)
        return self.step(
            Output(self.sequence, Stage.PREFILL, 0, (token,), text, logprobs, finish, report=report)
        )

    def decode(
        self,
        offset: int,
        *tokens: int,
        text: str = "",
        finish: FinishReason | None = None,
        stage: Stage = Stage.DECODE,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> list[Effect]:
        report = WorkerReport(
            landed_ago=2.5,
            scheduled_ago=2.25,
            first_token_ago=2.0,
            second_token_ago=1.5,
            handoff=Handoff("grpc", 10, 1, 0, 1, 0.1, 0.2),
        )
        event = Output(self.sequence, stage, offset, tokens, text, logprobs, finish)
        return self.step(event._replace(report=report) if finish else event)

    def fails(self, stage: Stage, error: PdserveError = LOST) -> list[Effect]:
        return self.step(WorkerFailed(self.sequence, stage, error))

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


def logprobs(*values: float) -> tuple[TokenLogprobs, ...]:
    """One entry a value; NaN: its worker does not know it."""
    return tuple(TokenLogprobs(Logprob(i, value, 1, "")) for i, value in enumerate(values))


def report_of(effects: list[Effect]) -> CompletionReport:
    (report,) = [e.report for e in effects if isinstance(e, Finish)]
    return report


def error_of(effects: list[Effect]) -> PdserveError:
    (error,) = [e.error for e in effects if isinstance(e, Fail)]
    return error


def cancelled(effects: list[Effect]) -> set[str]:
    return {e.worker.worker_id for e in effects if isinstance(e, CancelSequence)}
