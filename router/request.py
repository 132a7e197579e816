"""A request's state machine: its completions, and the one way in which it ends. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.errors import Cancelled
from router.completion import Completion
from router.events import (
    Abort,
    Cancel,
    Complete,
    Deadline,
    Effect,
    Event,
    Fail,
    Finish,
    GiveWay,
    Output,
    PromptComputed,
)
from router.generation import Generation
from router.output import Completed, CompletionReport, Delta, Phases
from router.states import TERMINAL, State
from router.tokens import SentTokens


class Request:
    """The machines of a request's n completions.

    It ends once: with Complete when every completion has finished, or with Fail when the first one
    fails, which cancels the others.

    Args:
        settled: whether tokens end with a whole character.
        sent: what another router has sent of each completion, to go on from.

    Raises:
        NotResumable: it could not go on exactly.
    """

    def __init__(
        self,
        generation: Generation,
        settled: Callable[[Sequence[int]], bool] = lambda _: True,
        sent: Sequence[SentTokens] | None = None,
    ) -> None:
        self.state = State.RECEIVED
        self._prompt_tokens = len(generation.prompt_token_ids)
        self._reports: dict[int, CompletionReport] = {}
        self.completions = [
            Completion(
                i,
                generation.sampling.completion(i),
                generation.received_at,
                settled,
                sent[i] if sent else None,
                generation.publish_after,
            )
            for i in range(generation.sampling.n)
        ]
        for before in sent or ():
            self._take_up(before)
        self._prompt_computed = False
        self._had = [c.tokens for c in self.completions]

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    @property
    def tokens(self) -> int:
        """How many the client was sent, of all completions."""
        return sum(c.tokens for c in self.completions)

    def step(self, now: float, event: Event, index: int | None = None) -> list[Effect]:
        """Takes an event, of completion `index` or of all of them."""
        if self.ended:
            return []
        effects: list[Effect] = []
        for completion in self.completions if index is None else [self.completions[index]]:
            for effect in completion.step(now, event):
                match effect:
                    case Finish(report):
                        self._reports[completion.index] = report
                    case Fail():
                        return [*effects, *self._fail(now, effect, event)]
                    case _:
                        effects.append(effect)
        if isinstance(event, GiveWay):
            self._prompt_computed = False
            self._had = [c.tokens for c in self.completions]
        elif not self._prompt_computed and all(map(self._got_on, self.completions)):
            self._prompt_computed = True
            effects.append(PromptComputed())
        if len(self._reports) == len(self.completions):
            self.state = State.FINISHED
            effects.append(Complete(self._completed()))
        elif not self.ended:
            self.state = self._least()
        return effects

    def more(self, now: float, event: Output, index: int) -> Delta | None:
        """As `step` for an output that only goes on: its delta is all that follows from it.

        None: it is not so plain, nothing has happened, and `step` is to take it.
        """
        if not self._prompt_computed:
            return None
        return self.completions[index].more(now, event)

    def _take_up(self, before: SentTokens) -> None:
        """A completion that was all sent has no report: the router that served it is gone."""
        completion = self.completions[before.index]
        if before.finished:
            completion.state = State.FINISHED
            self._reports[before.index] = CompletionReport(
                before.index, before.count, "", "", Phases(), None, 0, 0.0, 0.0
            )
        else:
            completion.check_goes_on()

    def _got_on(self, completion: Completion) -> bool:
        """It has got a token since it was admitted."""
        had = self._had[completion.index]
        return completion.tokens > had or completion.state in TERMINAL

    def _least(self) -> State:
        """How far the completion is that is least far."""
        if len(self.completions) == 1:
            return self.completions[0].state
        return min((c.state for c in self.completions), key=_PROGRESS.index)

    def _fail(self, now: float, fail: Fail, event: Event) -> list[Effect]:
        effects: list[Effect] = []
        for completion in self.completions:
            cleanup = event if isinstance(event, Cancel | Deadline) else Abort(fail.error)
            effects += [e for e in completion.step(now, cleanup) if not isinstance(e, Fail)]
        cancelled = isinstance(event, Cancel) and isinstance(fail.error, Cancelled)
        self.state = State.CANCELLED if cancelled else State.FAILED
        return [*effects, fail]

    def _completed(self) -> Completed:
        reports = tuple(self._reports[i] for i in range(len(self.completions)))
        return Completed(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(r.tokens for r in reports),
            # Those of the first: the others may find what the first has put there.
            cached_prompt_tokens=reports[0].cached_prompt_tokens,
            completions=reports,
        )


_PROGRESS = list(State)
