"""What is reported of a completion: who served it, where its time went, when it could be read."""

from __future__ import annotations

from router.attempt import Attempt
from router.events import Output
from router.output import CompletionReport, Delta, Handoff, Stage
from router.phases import Stamps


class Account:
    """Times of one completion, all on the router's clock.

    Args:
        publish_after: text or token id behind which the answer begins that a user sees.
    """

    def __init__(self, received_at: float, publish_after: str | int | None = None) -> None:
        self.stamps = Stamps(received_at)
        self._last_token_at = received_at
        self._cached_prompt_tokens = 0
        self._handoff: Handoff | None = None
        self._mark = publish_after
        self._marked = False
        self._tail = ""
        self._published_at: float | None = None

    def sent(self, now: float, delta: Delta) -> None:
        """The client is sent `delta`."""
        if delta.token_ids:
            if self.stamps.first_token is None:
                self.stamps.first_token = now
            self._last_token_at = now
        if self._mark is not None and self._published_at is None and self._is_past_mark(delta):
            self._published_at = now

    def reported(self, now: float, event: Output, attempt: Attempt) -> None:
        """Takes over a worker's own account; the first token is that of the first attempt."""
        report = event.report
        if report is None:
            return
        if event.stage is Stage.DECODE:
            self.stamps.decode_reported(now, report)
            self._handoff = report.handoff
        elif not attempt.sent_before:
            self._cached_prompt_tokens = report.cached_prompt_tokens
            if event.stage is Stage.PREFILL:
                self.stamps.prefill_reported(now, report)
            else:
                self.stamps.whole_reported(now, report)

    def report(
        self, now: float, index: int, tokens: int, attempt: Attempt, last: Stage
    ) -> CompletionReport:
        """Of a completion that ended now with the last output of `last`."""
        legs = attempt.legs
        first = legs.get(Stage.PREFILL) or legs[Stage.WHOLE]
        received, first_token_at = self.stamps.received, self.stamps.first_token or now
        gaps = tokens - 1
        return CompletionReport(
            index=index,
            tokens=tokens,
            prefill_worker=first.worker.worker_id,
            decode_worker="" if last is Stage.PREFILL else legs[last].worker.worker_id,
            phases=self.stamps.phases(now),
            handoff=self._handoff,
            cached_prompt_tokens=self._cached_prompt_tokens,
            ttft_seconds=first_token_at - received,
            tpot_seconds=(self._last_token_at - first_token_at) / gaps if gaps > 0 else 0.0,
            publish_seconds=None if self._published_at is None else self._published_at - received,
        )

    def _is_past_mark(self, delta: Delta) -> bool:
        """Something of the answer itself has come: behind the mark, in this delta or before it."""
        if isinstance(self._mark, int):
            behind = delta.token_ids
            if not self._marked and self._mark in behind:
                self._marked = True
                behind = behind[behind.index(self._mark) + 1 :]
            return self._marked and bool(behind)
        mark, text = self._mark or "", delta.text
        if not self._marked:
            seen = self._tail + text
            self._marked = mark in seen
            self._tail = seen[-len(mark) :]
            text = seen.partition(mark)[2]
        return self._marked and bool(text)
