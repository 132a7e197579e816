"""The simulated cluster: production's admission, placement and request machine, virtual workers.

Deterministic: the same workload, deployment and seed give the same outcomes. What is simulated and
what is left out is listed in docs/planning.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from cluster.errors import Overloaded, PdserveError, Unavailable
from cluster.ids import RequestId
from cluster.simulator.events import Agenda
from cluster.simulator.fleet import Deployment, Fleet
from cluster.simulator.gate import Gate
from cluster.simulator.job import Attempt
from cluster.simulator.outcome import Outcome
from cluster.simulator.placing import Placing, RouterPlacing
from cluster.simulator.serving import Serving
from cluster.simulator.worker import MODEL, VirtualWorker
from cluster.simulator.workload import Arrival
from router.events import (
    Abort,
    Admitted,
    CancelSequence,
    Complete,
    Deadline,
    Effect,
    Event,
    Fail,
    Place,
    Placed,
    PromptComputed,
    Started,
    StartSequence,
)
from router.generation import Generation, Sampling
from router.placement import Unplaced
from router.request import Request
from router.states import State

PLACEMENT_WAIT_SECONDS = 10.0
"""As the router's: how long an admitted request waits for workers that can take it."""


@lru_cache(4096)
def _greedy(output: int) -> Sampling:
    return Sampling(max_tokens=output, temperature=0.0)


class _Running:
    """A request between its arrival and its end; `place` while it waits for workers."""

    __slots__ = ("arrival", "attempt", "index", "place", "request", "retries")

    def __init__(self, index: int, arrival: Arrival, request: Request) -> None:
        self.index = index
        self.arrival = arrival
        self.request = request
        self.attempt = Attempt(index, "")
        self.place: Place | None = None
        self.retries = 0


class World:
    """One simulated cluster. `run` plays a workload; anything else is put on its `agenda`.

    Attributes:
        on_arrival: is told of every request that comes, admitted or not.
        on_end: is told of every request's end.
    """

    def __init__(
        self, deployment: Deployment, seed: int = 0, placing: Placing | None = None
    ) -> None:
        self.agenda = Agenda()
        self.fleet = Fleet(deployment, self.agenda)
        self.on_arrival: Callable[[Arrival], None] = lambda arrival: None
        self.on_end: Callable[[Outcome], None] = lambda outcome: None
        self.fleet.on_change = self._workers_changed
        self.fleet.on_lost = self._lost
        self._timeout = deployment.timeout
        self._start_within = deployment.start_within
        self._placing = placing or RouterPlacing(
            seed, deployment.ttft, deployment.tpot, deployment.placement_mode
        )
        self._gate = Gate(
            deployment, self.fleet, self.agenda, self._placing.paced, self._admit, self._refuse
        )
        self._serving = Serving(
            self.agenda, self.fleet.workers, self._tell, self.fleet.unused, self._placing
        )
        self._running: dict[int, _Running] = {}
        self._outcomes: list[Outcome | None] = []

    @property
    def running(self) -> int:
        """Requests that have arrived and not ended."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Of these, not admitted yet."""
        return self._gate.queued

    @property
    def queued_prompt_tokens(self) -> int:
        """Of these, prompts whose first token has not come: the backlog."""
        return sum(
            running.arrival.prompt
            for running in self._running.values()
            if running.request.tokens == 0
        )

    @property
    def unplaced(self) -> int:
        """Of these, admitted and without workers."""
        return sum(running.place is not None for running in self._running.values())

    def run(
        self,
        arrivals: Sequence[Arrival],
        until: float = math.inf,
        progress: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        """Plays the workload to its last end, or until then; outcomes in order of arrival.

        Args:
            arrivals: sorted by time.
            progress: is told now and then how many have arrived.
        """
        self._outcomes = [None] * len(arrivals)
        agenda, index = self.agenda, 0
        while index < len(arrivals) or self._running:
            arrives = arrivals[index].at if index < len(arrivals) else math.inf
            due = min(arrives, agenda.next_at)
            if due > until or due == math.inf:
                break
            if arrives <= agenda.next_at:
                agenda.now = arrives
                self._arrive(index, arrivals[index])
                index += 1
                if progress is not None and index % 1000 == 0:
                    progress(index)
            else:
                agenda.step()
        return [
            outcome or Outcome(a.kind, a.at, a.prompt, a.output, error="had not ended")
            for outcome, a in zip(self._outcomes, arrivals, strict=True)
        ]

    def _arrive(self, index: int, arrival: Arrival) -> None:
        self.on_arrival(arrival)
        now, name = self.agenda.now, str(index)
        generation = Generation(
            RequestId(name),
            MODEL,
            range(arrival.prompt),  # type: ignore[arg-type]  # only counted, never looked at
            _greedy(arrival.output),
            "",
            now,
            now + self._timeout,
        )
        running = _Running(index, arrival, Request(generation))
        try:
            start_by = min(generation.deadline, now + self._start_within)
            self._gate.offer(name, arrival.prompt, arrival.output, generation.deadline, start_by)
        except Overloaded as error:
            self._failed(running, error)
            return
        self._running[index] = running
        self.agenda.at(generation.deadline, lambda: self._deadline(index))
        self._gate.pump()

    def _admit(self, key: str) -> None:
        self._step(self._running[int(key)], Admitted())

    def _refuse(self, key: str, error: Overloaded) -> None:
        self._step(self._running[int(key)], Abort(error))

    def _deadline(self, index: int) -> None:
        if running := self._running.get(index):
            self._step(running, Deadline())

    def _tell(self, attempt: Attempt, event: Event) -> None:
        if not attempt.over:
            self._step(self._running[attempt.index], event)

    def _step(self, running: _Running, event: Event) -> None:
        for effect in running.request.step(self.agenda.now, event):
            self._act(running, effect)

    def _act(self, running: _Running, effect: Effect) -> None:
        match effect:
            case Place():
                self._serving.close(running.attempt)
                running.place = effect
                running.retries = effect.attempt
                if effect.delay_seconds:
                    self.agenda.after(effect.delay_seconds, lambda: self._place(running))
                else:
                    self._place(running)
            case StartSequence():
                if not running.attempt.over:
                    self._serving.start(
                        running.attempt, effect.worker, effect.stage, running.arrival
                    )
            case PromptComputed():
                self._gate.first_token(str(running.index))
            case CancelSequence(worker, _):
                self._serving.cancel(running.attempt, worker)
            case Complete(completed):
                report, arrival = completed.completions[0], running.arrival
                outcome = Outcome(
                    arrival.kind,
                    arrival.at,
                    arrival.prompt,
                    arrival.output,
                    report.ttft_seconds,
                    report.tpot_seconds,
                    self.agenda.now,
                    report.cached_prompt_tokens,
                    running.retries,
                )
                self._ended(running, outcome)
            case Fail(error):
                self._failed(running, error)

    def _failed(self, running: _Running, error: PdserveError) -> None:
        arrival = running.arrival
        outcome = Outcome(
            arrival.kind,
            arrival.at,
            arrival.prompt,
            arrival.output,
            ended_at=self.agenda.now,
            retries=running.retries,
            error=str(error),
        )
        self._ended(running, outcome)

    def _ended(self, running: _Running, outcome: Outcome) -> None:
        self._outcomes[running.index] = outcome
        self.on_end(outcome)
        if self._running.pop(running.index, None) is None:
            return
        running.place = None
        self._serving.close(running.attempt)
        self._gate.release(str(running.index), outcome.prompt + outcome.output)

    def _place(self, running: _Running) -> None:
        place = running.place
        if place is None:
            return
        plan = self._placing.place(
            self.agenda.now, running.arrival, place, self.fleet.workers.values()
        )
        if isinstance(plan, Unplaced):
            missing = plan.missing
            self.agenda.after(
                PLACEMENT_WAIT_SECONDS, lambda: self._give_up(running, place, missing)
            )
            return
        running.place = None
        running.attempt = Attempt(running.index, f"{running.index}.{place.attempt}")
        self._step(running, Placed(plan, running.attempt.sequence_id, b""))
        if running.request.state is State.PLACED:
            self._step(running, Started())

    def _workers_changed(self) -> None:
        self._gate.workers_changed()
        self._gate.pump()
        for running in [r for r in self._running.values() if r.place is not None]:
            self._place(running)

    def _give_up(self, running: _Running, place: Place, missing: str) -> None:
        if running.place is place:
            self._step(running, Abort(Unavailable(missing)))

    def _lost(self, worker: VirtualWorker) -> None:
        for running in list(self._running.values()):
            self._serving.lost(worker, running.attempt)
