"""Dispatch: drives every request's machine between the gate, placement and the workers' links."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cluster.clock import Clock
from cluster.errors import Overloaded, PdserveError, Unavailable
from cluster.ids import sequence_id
from cluster.pace import Pace
from cluster.ticket import prompt_digest
from router.admission.offers import Capacity, SloClass
from router.admission.policy import Policy
from router.events import (
    Abort,
    Admitted,
    Cancel,
    CancelSequence,
    Effect,
    GiveWay,
    Place,
    Placed,
    PromptComputed,
    Started,
    StartSequence,
    WorkerFailed,
)
from router.gate import Gate
from router.generation import Generation
from router.link import WorkerLink
from router.observe import Observer
from router.output import Completed
from router.placement import Plan, Target, Unplaced
from router.placer import Placer
from router.running import Running, request_key
from router.tickets import Cuts, TicketMint
from router.tokens import SentTokens
from router.validate import RequestIdTaken
from router.worker_wire import SequenceStart

PLACEMENT_WAIT_SECONDS = 10.0
"""How long an admitted request waits for workers that can take it."""

RECOVERY_WAIT_SECONDS = 120.0
"""How long one waits that has tokens already, for the next life of a worker that was lost."""


class Workers(Protocol):
    """What dispatch needs of the worker pool."""

    @property
    def routers(self) -> int: ...
    def link(self, target: Target) -> WorkerLink | None: ...


@dataclass
class _Unplaced:
    """A completion that waits for workers."""

    running: Running
    place: Place
    missing: str
    timer: asyncio.TimerHandle


class Dispatch:
    """Owns the requests that wait or run. All of it happens in one event loop.

    Args:
        settled: whether a model's tokens end with a whole character.
    """

    def __init__(
        self,
        policy: Policy,
        capacities: Callable[[], Mapping[str, Capacity]],
        workers: Workers,
        placer: Placer,
        mint: TicketMint,
        observer: Observer,
        clock: Clock,
        settled: Callable[[str, Sequence[int]], bool],
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace
        self._workers = workers
        self._placer = placer
        self._mint = mint
        self._observer = observer
        self._clock = clock
        self._settled = settled
        self.gate = Gate(
            policy, capacities, clock, self._admit, self._refuse, self._give_way, placer.cached
        )
        observer.watch(lambda: self.gate.running, self.gate.queued)
        self._requests: dict[str, Running] = {}
        self._unplaced: dict[tuple[str, int], _Unplaced] = {}
        self._asked: dict[tuple[str, int], Generation] = {}
        """What the present attempt at a completion asks of its workers."""
        self._nonce = secrets.token_hex(4)
        self._sequences = 0
        self._refusal: PdserveError | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        return len(self._requests)

    def check_room(self, tenant: str, slo_class: SloClass) -> None:
        """Raises what `submit` would raise for want of room, before work is spent on a request."""
        if self._refusal is not None:
            raise self._refusal
        self.gate.check(tenant, slo_class)

    def submit(self, generation: Generation, sent: Sequence[SentTokens] | None = None) -> Running:
        """Takes a request in. The caller consumes its deltas and calls `leave` in the end.

        Args:
            sent: what another router has sent of each completion, to go on from.

        Raises:
            NotResumable: it could not go on exactly.
            RequestIdTaken: it is running already.
            Overloaded: there is no room.
            Unavailable: the router is stopping.
        """
        if self._refusal is not None:
            raise self._refusal
        key = request_key(generation.tenant, generation.request_id)
        if key in self._requests:
            raise RequestIdTaken(generation.request_id, "running")
        settled = partial(self._settled, generation.model)
        running = Running(
            generation, self._clock, self._act, self._ended, self._pace, settled, sent
        )
        try:
            self.gate.offer(key, generation, going_on=sent is not None)
        except Overloaded:
            running.discard()
            raise
        self._requests[key] = running
        self._idle.clear()
        self._observer.received(running)
        self.gate.pump()
        return running

    def cancel(self, tenant: str, request_id: str) -> bool:
        """False if the tenant has no such request running."""
        running = self._requests.get(request_key(tenant, request_id))
        if running is None:
            return False
        running.step(Cancel())
        return True

    def workers_changed(self) -> None:
        """Tries to place what waits for workers, and to start what waits for room."""
        for key, waiting in list(self._unplaced.items()):
            if self._unplaced.get(key) is waiting:
                self._place(waiting.running, waiting.place)
        self.gate.set_share(1 / self._workers.routers)
        self.gate.pump()

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
            case PromptComputed():
                self._observer.prompt_computed(running)
                self.gate.first_token(running.key, self._placer.uncached(running.key))

    def _place(self, running: Running, place: Place) -> None:
        if running.request.ended:
            return
        generation = running.generation.going_on(place.prefix)
        decision = self._placer.place(running.key, generation, place)
        if isinstance(decision, Unplaced):
            self._wait_for_workers(running, place, decision.missing)
            return
        plan = decision.plan
        self._no_longer_waits(running.key, place.index)
        digest = running.prompt_digest
        if place.prefix:
            digest = prompt_digest(generation.prompt_token_ids)
        ticket = self._mint.mint(generation, digest, plan, self._cuts(plan))
        self._sequences += 1
        nonce = f"{self._nonce}{self._sequences}"
        name = sequence_id(generation.request_id, place.index, place.attempt, nonce)
        self._asked[running.key, place.index] = generation
        placed = Placed(plan, name, ticket, len(place.prefix), place.attempt)
        running.step(placed, place.index)
        running.step(Started(), place.index)

    def _cuts(self, plan: Plan) -> Cuts:
        prefill = self._workers.link(plan.prefill) if plan.prefill is not None else None
        decode = self._workers.link(plan.decode) if plan.decode is not None else None
        if prefill is None or decode is None:
            return Cuts()
        return Cuts(decode.record.layout, prefill.record.geometry, decode.record.geometry)

    def _wait_for_workers(self, running: Running, place: Place, missing: str) -> None:
        key = (running.key, place.index)
        if waiting := self._unplaced.get(key):
            waiting.missing = missing
            return
        loop = asyncio.get_running_loop()
        going_on = running.request.tokens > 0
        patience = RECOVERY_WAIT_SECONDS if going_on else PLACEMENT_WAIT_SECONDS
        timer = loop.call_later(patience, self._give_up, key)
        self._unplaced[key] = _Unplaced(running, place, missing, timer)

    def _give_up(self, key: tuple[str, int]) -> None:
        waiting = self._unplaced.pop(key)
        waiting.running.step(Abort(Unavailable(waiting.missing)))

    def _start(self, running: Running, effect: StartSequence) -> None:
        generation = self._asked[running.key, effect.index]
        link = self._workers.link(effect.worker)
        error = Unavailable(f"worker {effect.worker.worker_id} is not connected")
        if link is None or not link.connected:
            running.step(WorkerFailed(effect.sequence_id, effect.stage, error), effect.index)
            return

        link.start(
            SequenceStart(
                effect.sequence_id,
                effect.stage,
                generation.prompt_token_ids,
                generation.sampling.completion(effect.index),
                effect.ticket,
                generation.cache_salt,
            ),
            partial(running.hear, effect.index),
            self._placer.share(running.key, effect.index, effect.stage),
        )

    def _no_longer_waits(self, key: str, index: int) -> None:
        if waiting := self._unplaced.pop((key, index), None):
            waiting.timer.cancel()

    def _admit(self, key: str) -> None:
        self._requests[key].step(Admitted())

    def _refuse(self, key: str, error: Overloaded) -> None:
        self._requests[key].step(Abort(error))

    def _give_way(self, key: str) -> None:
        running = self._requests[key]
        for completion in running.request.completions:
            self._no_longer_waits(key, completion.index)
        running.step(GiveWay())

    def _ended(self, running: Running, end: Completed | PdserveError) -> None:
        del self._requests[running.key]
        for completion in running.request.completions:
            self._asked.pop((running.key, completion.index), None)
            self._no_longer_waits(running.key, completion.index)
        self.gate.release(running.key, running.generation, running.request.tokens)
        self._placer.ended(running.key, running.generation, end)
        self._observer.ended(running, end)
        if not self._requests:
            self._idle.set()
