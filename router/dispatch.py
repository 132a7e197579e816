"""Dispatch: drives every request's machine between admission, placement and the workers' links."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.clock import Clock
from cluster.config import RouterConfig
from cluster.errors import InvalidRequest, PdserveError, Unavailable
from cluster.ids import sequence_id
from router.admission import Admission
from router.events import (
    Abort,
    Admitted,
    Cancel,
    CancelSequence,
    Effect,
    Output,
    Place,
    Placed,
    Started,
    StartSequence,
    WorkerFailed,
)
from router.generation import Generation
from router.link import WorkerLink
from router.observe import Observer
from router.output import Completed
from router.placement import Demand, Placement, Target, Unplaced, WorkerView
from router.running import Running
from router.tickets import TicketMint
from router.worker_wire import SequenceStart

PLACEMENT_WAIT_SECONDS = 10.0
"""How long an admitted request waits for workers that can take it."""


class Workers(Protocol):
    """What dispatch needs of the worker pool."""

    def view(self) -> Sequence[WorkerView]: ...
    def link(self, target: Target) -> WorkerLink | None: ...


@dataclass
class _Unplaced:
    """A completion that waits for workers."""

    running: Running
    place: Place
    missing: str
    timer: asyncio.TimerHandle


class Dispatch:
    """Owns the requests that wait or run. All of it happens in one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        workers: Workers,
        placement: Placement,
        mint: TicketMint,
        observer: Observer,
        clock: Clock,
    ) -> None:
        self._workers = workers
        self._placement = placement
        self._mint = mint
        self._observer = observer
        self._clock = clock
        self._admission = Admission(config.max_running_requests, config.max_queued_requests)
        self._requests: dict[str, Running] = {}
        self._unplaced: dict[tuple[str, int], _Unplaced] = {}
        self._nonce = secrets.token_hex(4)
        self._refusal: PdserveError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        return len(self._requests)

    def check_room(self) -> None:
        """Raises what `submit` would raise for want of room, before work is spent on a request."""
        if self._refusal is not None:
            raise self._refusal
        self._admission.check()

    def submit(self, generation: Generation) -> Running:
        """Takes a request in. The caller consumes its deltas and calls `leave` in the end.

        Raises:
            InvalidRequest: its request_id is running already.
            Overloaded: there is no room.
            Unavailable: the router is stopping.
        """
        self.check_room()
        if generation.request_id in self._requests:
            raise InvalidRequest(
                "request_id", f"{generation.request_id} is the id of a request that is running"
            )
        admitted = self._admission.offer(self._clock.now(), generation.request_id)
        running = Running(generation, self._clock, self._act, self._ended)
        self._requests[generation.request_id] = running
        self._idle.clear()
        self._observer.received(running)
        self._gauge()
        if admitted:
            running.step(Admitted())
        return running

    def cancel(self, request_id: str) -> bool:
        """False if no such request is running."""
        running = self._requests.get(request_id)
        if running is None:
            return False
        running.step(Cancel())
        return True

    def workers_changed(self) -> None:
        """Tries to place what waits for workers."""
        for key, waiting in list(self._unplaced.items()):
            if self._unplaced.get(key) is waiting:
                self._place(waiting.running, waiting.place)

    def refuse(self, error: PdserveError) -> None:
        """From now on nothing is taken in."""
        self._refusal = error

    async def drain(self, seconds: float) -> None:
        """Waits until nothing runs; what still does after `seconds` is given up."""
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            for running in list(self._requests.values()):
                running.step(Abort(Unavailable("the router shut down before the request ended")))

    def _act(self, running: Running, effect: Effect) -> None:
        match effect:
            case Place():
                if effect.attempt:
                    self._observer.retried(running)
                if effect.delay_seconds:
                    loop = asyncio.get_running_loop()
                    loop.call_later(effect.delay_seconds, self._place, running, effect)
                else:
                    self._place(running, effect)
            case StartSequence():
                self._start(running, effect)
            case CancelSequence(worker, sequence):
                if link := self._workers.link(worker):
                    link.cancel(sequence)

    def _place(self, running: Running, place: Place) -> None:
        if running.request.ended:
            return
        generation = running.generation
        demand = Demand(
            generation.model,
            len(generation.prompt_token_ids),
            generation.max_tokens,
            decodes=generation.max_tokens > 1,
            avoid=place.avoid,
        )
        view = self._workers.view()
        plan = self._placement.place(demand, view)
        if isinstance(plan, Unplaced):
            self._wait_for_workers(running, place, plan.missing)
            return
        self._no_longer_waits(generation.request_id, place.index)
        by_id = {w.target.worker_id: w for w in view}
        ticket = self._mint.mint(generation, running.prompt_digest, plan, by_id)
        name = sequence_id(generation.request_id, place.index, place.attempt, self._nonce)
        running.step(Placed(plan, name, ticket), place.index)
        running.step(Started(), place.index)

    def _wait_for_workers(self, running: Running, place: Place, missing: str) -> None:
        key = (running.generation.request_id, place.index)
        if waiting := self._unplaced.get(key):
            waiting.missing = missing
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_later(PLACEMENT_WAIT_SECONDS, self._give_up, key)
        self._unplaced[key] = _Unplaced(running, place, missing, timer)

    def _give_up(self, key: tuple[str, int]) -> None:
        waiting = self._unplaced.pop(key)
        waiting.running.step(Abort(Unavailable(waiting.missing)))

    def _start(self, running: Running, effect: StartSequence) -> None:
        generation = running.generation
        link = self._workers.link(effect.worker)
        error = Unavailable(f"worker {effect.worker.worker_id} is not connected")
        if link is None or not link.connected:
            running.step(WorkerFailed(effect.sequence_id, effect.stage, error), effect.index)
            return

        def listener(event: Output | WorkerFailed) -> None:
            running.step(event, effect.index)

        link.start(
            SequenceStart(
                effect.sequence_id,
                effect.stage,
                generation.prompt_token_ids,
                generation.sampling.completion(effect.index),
                effect.ticket,
                generation.cache_salt,
            ),
            listener,
        )

    def _no_longer_waits(self, request_id: str, index: int) -> None:
        if waiting := self._unplaced.pop((request_id, index), None):
            waiting.timer.cancel()

    def _ended(self, running: Running, end: Completed | PdserveError) -> None:
        request_id = running.generation.request_id
        del self._requests[request_id]
        for completion in running.request.completions:
            self._no_longer_waits(request_id, completion.index)
        admitted = self._admission.release(self._clock.now(), request_id)
        self._observer.ended(running, end)
        self._gauge()
        if not self._requests:
            self._idle.set()
        for name in admitted:
            if waiting := self._requests.get(name):
                waiting.step(Admitted())

    def _gauge(self) -> None:
        self._observer.load(self._admission.running, self._admission.queued)
