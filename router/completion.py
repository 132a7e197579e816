"""One completion's state machine. Pure: `step(now, event)` returns what is to be done.

    RECEIVED ─admitted─► ADMITTED ─placed─► PLACED ─started─► PREFILLING
        ─first token─► FIRST_TOKEN ─decode's own tokens─► DECODING ─► FINISHED
    and from every state ─► FAILED or CANCELLED; a retry goes back to ADMITTED.

Prefill and decode work on it at once under one sequence id. Prefill answers once, with the first
token; decode's stream begins with the same token. Whichever comes first is sent.

When prefill's token is the last one, nothing is pushed and decode gives up: so a retryable failure
of decode counts only once prefill has answered, or failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.errors import Cancelled, DeadlineExceeded, PdserveError, Unavailable
from router.events import (
    Abort,
    Admitted,
    Cancel,
    CancelSequence,
    Deadline,
    Effect,
    Emit,
    Event,
    Fail,
    Finish,
    Output,
    Place,
    Placed,
    Started,
    StartSequence,
    WorkerFailed,
)
from router.generation import Sampling
from router.output import CompletionReport, FinishReason, Handoff, Stage
from router.phases import Stamps
from router.placement import Plan, Target
from router.tokens import Contradiction, SentTokens, Source

MAX_RETRIES = 2
RETRY_DELAY_SECONDS = 0.05
"""Before the second retry; the first comes at once, on other workers."""


class State(StrEnum):
    """Where a completion is."""

    RECEIVED = "received"
    ADMITTED = "admitted"
    PLACED = "placed"
    PREFILLING = "prefilling"
    FIRST_TOKEN = "first_token"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})


@dataclass
class _Leg:
    """One worker's part in an attempt; ended when it sent its last output or failed."""

    worker: Target
    source: Source = field(default_factory=Source)
    ended: bool = False


@dataclass
class _Attempt:
    """One try; `decode_error` is decode's failure while prefill has yet to answer."""

    sequence_id: str
    legs: dict[Stage, _Leg]
    decode_error: PdserveError | None = None


class Completion:
    """The machine of completion `index`.

    Args:
        sampling: the completion's own, with max_tokens set.
        received_at: on the clock that `step` is given.
    """

    def __init__(self, index: int, sampling: Sampling, received_at: float) -> None:
        self.index = index
        self.state = State.RECEIVED
        self._sampling = sampling
        self._stamps = Stamps(received_at)
        self._sent = SentTokens(index)
        self._attempt = _Attempt("", {})
        self._retries = 0
        self._avoid: frozenset[str] = frozenset()
        self._last_token_at = received_at
        self._cached_prompt_tokens = 0
        self._handoff: Handoff | None = None

    @property
    def tokens(self) -> int:
        """How many the client was sent."""
        return self._sent.count

    @property
    def first_token_at(self) -> float | None:
        return self._stamps.first_token

    def step(self, now: float, event: Event) -> list[Effect]:
        """Takes an event; events of a former attempt or after the end do nothing."""
        if self.state in TERMINAL:
            return []
        if isinstance(event, Output):  # first, because there is one for every token
            return self._output(now, event)
        match event:
            case Admitted():
                self.state = State.ADMITTED
                return [Place(self.index, 0)]
            case Placed():
                return self._placed(now, event)
            case Started():
                if self.state is State.PLACED:
                    self.state = State.PREFILLING
                return []
            case WorkerFailed():
                return self._worker_failed(event)
            case Cancel():
                return self._fail(Cancelled("the request was cancelled"), State.CANCELLED)
            case Deadline():
                return self._fail(DeadlineExceeded("the request's deadline passed"))
            case Abort(error):
                return self._fail(error)

    def _placed(self, now: float, event: Placed) -> list[Effect]:
        if self.state is not State.ADMITTED:
            return []
        self.state = State.PLACED
        if self._sent.count == 0:
            self._stamps.placed = now
        self._attempt = _Attempt(event.sequence_id, _legs(event.plan))
        return [
            StartSequence(self.index, leg.worker, stage, event.sequence_id, event.ticket)
            for stage, leg in self._attempt.legs.items()
        ]

    def _output(self, now: float, event: Output) -> list[Effect]:
        leg = self._leg(event.sequence_id, event.stage)
        if leg is None:
            return []
        finish = self._finish_reason(event)
        try:
            if event.stage is Stage.PREFILL:
                self._check_prefill(event, finish)
                if self._attempt.decode_error is not None and finish is None:
                    leg.ended = True
                    return self._retry_or_fail(self._attempt.decode_error, Stage.DECODE)
            delta = self._sent.take(event, leg.source, finish)
        except Contradiction as error:
            return self._fail(error)
        leg.ended = event.finish is not None
        self._report(now, event)
        effects: list[Effect] = []
        if delta is not None:
            if delta.token_ids:
                self._advance(now)
            effects.append(Emit(delta))
        if finish is not None:
            effects += self._cancel_legs()
            self.state = State.FINISHED
            effects.append(Finish(self._completion_report(now, event.stage)))
        return effects

    def _check_prefill(self, event: Output, finish: FinishReason | None) -> None:
        """Raises Contradiction unless it is prefill's one message and decode agrees with it."""
        if len(event.token_ids) != 1 or event.finish is None:
            raise Contradiction("prefill answered with other than one token and an end")
        if finish is not None and self._sent.count > 1:
            raise Contradiction("prefill ended with its first token, decode went on")

    def _finish_reason(self, event: Output) -> FinishReason | None:
        """Why the completion ends with `event`; prefill's LENGTH is only its clamp to one token."""
        if event.stage is Stage.PREFILL and event.finish is FinishReason.LENGTH:
            alone = Stage.DECODE not in self._attempt.legs
            return event.finish if alone or self._sampling.max_tokens == 1 else None
        return event.finish

    def _advance(self, now: float) -> None:
        if self._stamps.first_token is None:
            self._stamps.first_token = now
        self._last_token_at = now
        self.state = State.FIRST_TOKEN if self._sent.count == 1 else State.DECODING

    def _report(self, now: float, event: Output) -> None:
        report = event.report
        if report is None:
            return
        if event.stage is Stage.DECODE:
            self._stamps.decode_reported(now, report)
            self._handoff = report.handoff
            return
        self._cached_prompt_tokens = report.cached_prompt_tokens
        if event.stage is Stage.PREFILL:
            self._stamps.prefill_reported(now, report)
        else:
            self._stamps.whole_reported(now, report)

    def _completion_report(self, now: float, last: Stage) -> CompletionReport:
        legs = self._attempt.legs
        first = legs.get(Stage.PREFILL) or legs[Stage.WHOLE]
        first_token_at = self._stamps.first_token or now
        gaps = self._sent.count - 1
        return CompletionReport(
            index=self.index,
            tokens=self._sent.count,
            prefill_worker=first.worker.worker_id,
            decode_worker="" if last is Stage.PREFILL else legs[last].worker.worker_id,
            phases=self._stamps.phases(now),
            handoff=self._handoff,
            cached_prompt_tokens=self._cached_prompt_tokens,
            ttft_seconds=first_token_at - self._stamps.received,
            tpot_seconds=(self._last_token_at - first_token_at) / gaps if gaps > 0 else 0.0,
        )

    def _worker_failed(self, event: WorkerFailed) -> list[Effect]:
        leg = self._leg(event.sequence_id, event.stage)
        if leg is None:
            return []
        leg.ended = True
        decode = self._attempt.legs.get(Stage.DECODE)
        if event.stage is Stage.PREFILL and decode and not decode.ended and decode.source.tokens:
            return []  # Decode has what prefill was for.
        if self._attempt.decode_error is not None and event.error.retryable:
            return self._retry_or_fail(self._attempt.decode_error, Stage.DECODE, Stage.PREFILL)
        prefill = self._attempt.legs.get(Stage.PREFILL)
        undecided = prefill is not None and not prefill.ended and self._sent.count <= 1
        if event.stage is Stage.DECODE and event.error.retryable and undecided:
            self._attempt.decode_error = event.error
            return []
        return self._retry_or_fail(event.error, event.stage)

    def _retry_or_fail(self, error: PdserveError, *failed: Stage) -> list[Effect]:
        if error.retryable and self._may_retry():
            return self._retry(failed)
        if self._sent.count and error.retryable:
            error = Unavailable(f"{error} after {self._sent.count} tokens had been sent")
        return self._fail(error)

    def _may_retry(self) -> bool:
        if self._retries >= MAX_RETRIES or self._sent.count > 1:
            return False
        return self._sent.count == 0 or self._sampling.replayable

    def _retry(self, failed: Iterable[Stage]) -> list[Effect]:
        effects = self._cancel_legs()
        self._retries += 1
        self._avoid |= {self._attempt.legs[stage].worker.worker_id for stage in failed}
        self._attempt = _Attempt("", {})
        self.state = State.ADMITTED
        delay = RETRY_DELAY_SECONDS * (self._retries - 1)
        return [*effects, Place(self.index, self._retries, self._avoid, delay)]

    def _fail(self, error: PdserveError, state: State = State.FAILED) -> list[Effect]:
        self.state = state
        return [*self._cancel_legs(), Fail(error)]

    def _cancel_legs(self) -> list[Effect]:
        effects: list[Effect] = []
        for leg in self._attempt.legs.values():
            if not leg.ended:
                leg.ended = True
                effects.append(CancelSequence(leg.worker, self._attempt.sequence_id))
        return effects

    def _leg(self, sequence_id: str, stage: Stage) -> _Leg | None:
        """The part of the present attempt that is still going on, or None."""
        if sequence_id != self._attempt.sequence_id:
            return None
        leg = self._attempt.legs.get(stage)
        return None if leg is None or leg.ended else leg


def _legs(plan: Plan) -> dict[Stage, _Leg]:
    """Decode comes first: it reserves its blocks while prefill is still on its way."""
    workers = {
        Stage.DECODE: plan.decode,
        Stage.PREFILL: plan.prefill,
        Stage.WHOLE: plan.whole,
    }
    return {stage: _Leg(worker) for stage, worker in workers.items() if worker is not None}
