"""A request while it runs: its machine, its buffer, its timers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from cluster.clock import Clock
from cluster.errors import Overloaded, PdserveError
from cluster.ids import RequestId
from cluster.pace import Pace
from cluster.ticket import prompt_digest
from router.buffer import OutputBuffer
from router.events import (
    Abort,
    Cancel,
    Complete,
    Deadline,
    Effect,
    Emit,
    Event,
    Fail,
    Output,
    WorkerFailed,
)
from router.generation import Generation
from router.output import Completed, Delta
from router.request import Request
from router.tokens import SentTokens

SLOW_CLIENT_RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class Running:
    """One request from its admission or queueing to its end; an `Answer`.

    Args:
        act: carries out the effects that concern workers.
        ended: called once, after the end.
        pace: how long tokens gather on their way to the client.
        settled: whether tokens end with a whole character.
        sent: what another router has sent of each completion, to go on from.
    """

    def __init__(
        self,
        generation: Generation,
        clock: Clock,
        act: Callable[[Running, Effect], None],
        ended: Callable[[Running, Completed | PdserveError], None],
        pace: Pace | None = None,
        settled: Callable[[Sequence[int]], bool] = lambda _: True,
        sent: Sequence[SentTokens] | None = None,
    ) -> None:
        self.generation = generation
        self.key = request_key(generation.tenant, generation.request_id)
        self.request = Request(generation, settled, sent)
        self.buffer = OutputBuffer(pace=pace)
        self.prompt_digest = prompt_digest(generation.prompt_token_ids)
        self.received_wall = clock.wall() - (clock.now() - generation.received_at)
        self._clock = clock
        self._act = act
        self._ended = ended
        self._events: deque[tuple[Event, int | None]] = deque()
        self._stepping = False
        self._deadline = asyncio.get_running_loop().call_later(
            max(0.0, generation.deadline - clock.now()), self.step, Deadline()
        )

    def step(self, event: Event, index: int | None = None) -> None:
        """Feeds the machine and carries out what it asks for.

        An effect may cause another event at once, as when a worker's link turns out to be down: it
        waits its turn.
        """
        if self._stepping:
            self._events.append((event, index))
            return
        self._stepping = True
        try:
            while True:
                for effect in self.request.step(self._clock.now(), event, index):
                    self._try(effect)
                if not self._events:
                    break
                event, index = self._events.popleft()
        finally:
            self._stepping = False

    def hear(self, index: int, event: Output | WorkerFailed) -> None:
        """What a worker says of completion `index`: for a plain token the short way, as there is
        one of them for every token."""
        if isinstance(event, Output) and not self._stepping:
            delta = self.request.more(self._clock.now(), event, index)
            if delta is not None:
                if not self.buffer.put(delta):
                    self._cut_off()
                return
        self.step(event, index)

    @property
    def request_id(self) -> RequestId:
        return self.generation.request_id

    @property
    def model(self) -> str:
        return self.generation.model

    @property
    def n(self) -> int:
        return self.generation.sampling.n

    @property
    def completed(self) -> Completed:
        return self.buffer.completed

    @property
    def error(self) -> PdserveError | None:
        return self.buffer.error

    @property
    def on_cut(self) -> Callable[[], None] | None:
        return self.buffer.on_cut

    @on_cut.setter
    def on_cut(self, cut: Callable[[], None] | None) -> None:
        self.buffer.on_cut = cut

    @property
    def direct(self) -> Callable[[Delta], bool] | None:
        return self.buffer.direct

    @direct.setter
    def direct(self, send: Callable[[Delta], bool] | None) -> None:
        self.buffer.direct = send

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What is there for the client, again and again until the end; one consumer.

        Raises:
            PdserveError: the request failed.
        """
        while batch := await self.buffer.take():
            yield batch

    def leave(self) -> None:
        """The client's call is over: whatever still runs is cancelled."""
        late = self._clock.now() >= self.generation.deadline
        self.step(Deadline() if late else Cancel())

    def discard(self) -> None:
        """It was not taken in after all: no event comes."""
        self._deadline.cancel()

    def _try(self, effect: Effect) -> None:
        """A bug in one effect ends this request, not the task that brought the event."""
        try:
            self._carry_out(effect)
        except Exception:
            log.exception("request %s: an effect failed", self.generation.request_id)
            self._events.append((Abort(PdserveError("an effect failed")), None))

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Emit(delta):
                if not self.buffer.put(delta):
                    self._cut_off()
            case Complete(completed):
                self._end(completed)
            case Fail(error):
                self._end(error)
            case _:
                self._act(self, effect)

    def _cut_off(self) -> None:
        slow = "the client reads too slowly: its output buffer is full"
        self.step(Abort(Overloaded(slow, SLOW_CLIENT_RETRY_SECONDS)))

    def _end(self, end: Completed | PdserveError) -> None:
        self._deadline.cancel()
        self.buffer.close(end)
        late = self._clock.now() >= self.generation.deadline
        try:
            if isinstance(end, Overloaded) or (late and isinstance(end, PdserveError)):
                self.buffer.cut()
        finally:
            self._ended(self, end)


def request_key(tenant: str, request_id: str) -> str:
    """What a request is filed under: ids are the caller's, and two tenants may choose the same."""
    return f"{tenant}/{request_id}"
