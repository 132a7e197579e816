"""One completion's state machine. Pure: `step(now, event)` returns what is to be done.

    RECEIVED ─admitted─► ADMITTED ─placed─► PLACED ─started─► PREFILLING
        ─first token─► FIRST_TOKEN ─decode's own tokens─► DECODING ─► FINISHED
    and from every state ─► FAILED or CANCELLED; a retry goes back to ADMITTED, and a request that
    gives way to RECEIVED.

Prefill and decode work on it at once under one sequence id. Prefill answers once, with the first
token; decode's stream begins with the same token. Whichever comes first is sent – but the first
token's logprobs are known to prefill alone: where they are asked for, decode's output waits for it.

A worker may be lost after tokens were sent: the next attempt goes on at the next offset, in one of
the ways of `router.replay`, or the completion fails where none is exact.

When prefill's token is the last one, nothing is pushed and decode gives up: so a retryable failure
of decode counts only once prefill has answered, or failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.errors import Cancelled, DeadlineExceeded, NotResumable, PdserveError, Unavailable
from router.account import Account
from router.attempt import Attempt, Leg, legs
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
    GiveWay,
    Output,
    Place,
    Placed,
    Started,
    StartSequence,
    WorkerFailed,
)
from router.generation import Sampling
from router.output import Delta, FinishReason, Stage
from router.replay import Replay, how, why_not
from router.states import TERMINAL, State
from router.tokens import Contradiction, SentTokens, Source

MAX_RETRIES = 2
RETRY_DELAY_SECONDS = 0.05
"""Before the second retry; the first comes at once, on other workers."""
NOT_THE_SAME = "the next one did not give the same tokens again"


class Completion:
    """The machine of completion `index`.

    Args:
        sampling: the completion's own, with max_tokens set.
        received_at: on the clock that `step` is given.
        settled: whether tokens end with a whole character.
        sent: what another router has sent of it, to go on from.
        publish_after: as in `Account`.
    """

    def __init__(
        self,
        index: int,
        sampling: Sampling,
        received_at: float,
        settled: Callable[[Sequence[int]], bool] = lambda _: True,
        sent: SentTokens | None = None,
        publish_after: str | int | None = None,
    ) -> None:
        self.index = index
        self.state = State.RECEIVED
        self._sampling = sampling
        self._account = Account(received_at, publish_after)
        self._sent = sent or SentTokens(index)
        self._attempt = Attempt()
        self._attempts = 0
        self._failures = 0
        self._settled = settled
        self._avoid: frozenset[str] = frozenset()

    @property
    def tokens(self) -> int:
        """How many the client was sent."""
        return self._sent.count

    def check_goes_on(self) -> None:
        """Raises NotResumable if it cannot go on exactly after what was sent."""
        if self._replay() is None:
            sent = f"after {self._sent.count} tokens"
            raise NotResumable(f"it cannot go on exactly {sent}: {why_not(self._sampling)}")

    @property
    def first_token_at(self) -> float | None:
        return self._account.stamps.first_token

    def step(self, now: float, event: Event) -> list[Effect]:
        """Takes an event; events of a former attempt or after the end do nothing."""
        if self.state in TERMINAL:
            return []
        if isinstance(event, Output):  # first, because there is one for every token
            return self._output(now, event)
        match event:
            case Admitted():
                return self._place()
            case GiveWay():
                return self._give_way()
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

    def more(self, now: float, event: Output) -> Delta | None:
        """As `Request.more`: the next tokens from the worker that sent those before."""
        if self.state is not State.DECODING or event.finish is not None:
            return None
        attempt, stage = self._attempt, event.stage
        leg = attempt.leg(event.sequence_id, stage)
        if leg is None or stage is Stage.PREFILL or event.report is not None:
            return None
        delta = self._sent.more(event, leg.source, attempt.base)
        if delta is not None:
            self._account.sent(now, delta)
        return delta

    def _placed(self, now: float, event: Placed) -> list[Effect]:
        if self.state is not State.ADMITTED or event.attempt not in (None, self._attempts - 1):
            return []
        self.state = State.PLACED
        if self._sent.count == 0:
            self._account.stamps.placed = now
        base = Source(event.base, self._sent.chars if event.base else 0)
        parts = legs(event.plan, base)
        self._attempt = Attempt(event.sequence_id, parts, event.base, self._sent.count)
        return [
            StartSequence(self.index, leg.worker, stage, event.sequence_id, event.ticket)
            for stage, leg in self._attempt.legs.items()
        ]

    def _output(self, now: float, event: Output) -> list[Effect]:
        attempt = self._attempt
        leg = attempt.leg(event.sequence_id, event.stage)
        if leg is None:
            return []
        if attempt.base:
            event = event._replace(offset=event.offset + attempt.base)
        if self._needs_prefill(event):
            attempt.held.append(event)
            return []
        effects = self._take(now, event, leg)
        if event.stage is Stage.PREFILL:
            for each in attempt.held:
                if decode := self._attempt.leg(each.sequence_id, each.stage):
                    effects += self._take(now, each, decode)
        return effects

    def _needs_prefill(self, event: Output) -> bool:
        """It is decode's, and the client cannot have it before what prefill has yet to answer."""
        attempt = self._attempt
        prefill = attempt.legs.get(Stage.PREFILL)
        if event.stage is not Stage.DECODE or prefill is None or prefill.ended:
            return False
        unknown = bool(event.logprobs) and not event.logprobs[0].known
        return bool(attempt.held) or (unknown and self._sent.count <= event.offset)

    def _take(self, now: float, event: Output, leg: Leg) -> list[Effect]:
        finish = self._finish_reason(event)
        try:
            if event.stage is Stage.PREFILL:
                self._check_prefill(event, finish)
                if self._attempt.decode_error is not None and finish is None:
                    leg.ended = True
                    return self._retry_or_fail(self._attempt.decode_error, Stage.DECODE)
            delta = self._sent.take(event, leg.source, finish)
        except Contradiction as error:
            if self._attempt.sent_before > 1:
                return self._fail(Unavailable(f"a worker was lost and {NOT_THE_SAME}"))
            return self._fail(error)
        leg.ended = event.finish is not None
        self._account.reported(now, event, self._attempt)
        effects: list[Effect] = []
        if delta is not None:
            self._account.sent(now, delta)
            if delta.token_ids:
                self.state = State.FIRST_TOKEN if self._sent.count == 1 else State.DECODING
            effects.append(Emit(delta))
        if finish is not None:
            effects += self._cancel_legs()
            self.state = State.FINISHED
            report = self._account.report(
                now, self.index, self._sent.count, self._attempt, event.stage
            )
            effects.append(Finish(report))
        return effects

    def _check_prefill(self, event: Output, finish: FinishReason | None) -> None:
        """Raises Contradiction unless it is prefill's one message and decode agrees with it."""
        if len(event.token_ids) != 1 or event.finish is None:
            raise Contradiction("prefill answered with other than one token and an end")
        if finish is not None and self._sent.count > self._attempt.base + 1:
            raise Contradiction("prefill ended with its first token, decode went on")

    def _finish_reason(self, event: Output) -> FinishReason | None:
        """Why the completion ends with `event`; prefill's LENGTH is only its clamp to one token."""
        if event.stage is Stage.PREFILL and event.finish is FinishReason.LENGTH:
            alone = Stage.DECODE not in self._attempt.legs
            one_was_left = self._sampling.max_tokens == self._attempt.base + 1
            return event.finish if alone or one_was_left else None
        return event.finish

    def _worker_failed(self, event: WorkerFailed) -> list[Effect]:
        leg = self._attempt.leg(event.sequence_id, event.stage)
        if leg is None:
            return []
        leg.ended = True
        decode = self._attempt.legs.get(Stage.DECODE)
        if event.stage is Stage.PREFILL and decode and not decode.ended and self._began(decode):
            return []  # Decode has what prefill was for.
        if self._attempt.decode_error is not None and event.error.retryable:
            return self._retry_or_fail(self._attempt.decode_error, Stage.DECODE, Stage.PREFILL)
        prefill = self._attempt.legs.get(Stage.PREFILL)
        undecided = (
            prefill is not None
            and not prefill.ended
            and (self._sent.count <= self._attempt.base + 1)
        )
        if event.stage is Stage.DECODE and event.error.retryable and undecided:
            self._attempt.decode_error = event.error
            return []
        return self._retry_or_fail(event.error, event.stage)

    def _began(self, leg: Leg) -> bool:
        return leg.source.tokens > self._attempt.base

    def _retry_or_fail(self, error: PdserveError, *failed: Stage) -> list[Effect]:
        if not error.retryable:
            return self._fail(error)
        if self._sent.count > self._attempt.sent_before:
            self._failures = 0  # It got on: a long answer may outlive many workers.
        self._failures += 1
        sent = f" after {self._sent.count} tokens had been sent" if self._sent.count else ""
        if self._failures > MAX_RETRIES:
            return self._fail(Unavailable(f"{error}{sent}") if sent else error)
        if self._replay() is None:
            reason = why_not(self._sampling)
            return self._fail(Unavailable(f"{error}{sent}; it cannot go on exactly: {reason}"))
        self._avoid |= {self._attempt.legs[stage].worker.worker_id for stage in failed}
        effects = self._cancel_legs()
        return [*effects, *self._place(RETRY_DELAY_SECONDS * (self._failures - 1))]

    def _place(self, delay_seconds: float = 0.0) -> list[Effect]:
        """The next attempt."""
        self.state = State.ADMITTED
        going_on = self._replay() is Replay.CONTINUE
        prefix = self._sent.token_ids if going_on else ()
        self._attempt = Attempt()
        self._attempts += 1
        return [Place(self.index, self._attempts - 1, self._avoid, delay_seconds, prefix)]

    def _replay(self) -> Replay | None:
        settled = self._sent.count == 0 or self._settled(self._sent.token_ids)
        return how(self._sampling, self._sent.count, settled)

    def _give_way(self) -> list[Effect]:
        """Back to where it waits for admission, if it can go on from there."""
        if self._replay() is None:
            reason = why_not(self._sampling)
            gave_way = "it gave way to online work and cannot go on exactly"
            return self._fail(Unavailable(f"{gave_way}: {reason}"))
        effects = self._cancel_legs()
        self.state = State.RECEIVED
        self._attempt = Attempt()
        return effects

    def _fail(self, error: PdserveError, state: State = State.FAILED) -> list[Effect]:
        self.state = state
        return [*self._cancel_legs(), Fail(error)]

    def _cancel_legs(self) -> list[Effect]:
        name = self._attempt.sequence_id
        return [CancelSequence(leg.worker, name) for leg in self._attempt.end()]
