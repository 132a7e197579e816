"""How a request ends towards its client: once, and never without giving its place back."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.clock import VirtualClock
from cluster.errors import DeadlineExceeded, PdserveError
from cluster.ids import RequestId
from router.events import Abort, Admitted, Effect, Output, Place, Placed, Started
from router.generation import Generation, Sampling
from router.inference import _send
from router.output import Completed, FinishReason, Stage
from router.placement import Plan, Target
from router.running import Running

DEADLINE = 1000.0


class Desk:
    """A running request on a virtual clock; the timer of its deadline does not fire by itself."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.ends: list[Completed | PdserveError] = []
        start = self.clock.now()
        generation = Generation(
            RequestId("r"), "m", (1, 2), Sampling(max_tokens=4), "", start, start + DEADLINE
        )
        self.running = Running(generation, self.clock, self._act, lambda _, e: self.ends.append(e))
        self.running.step(Admitted())

    def _act(self, running: Running, effect: Effect) -> None:
        if isinstance(effect, Place):
            running.step(Placed(Plan(whole=Target("w-0", "x")), "s", b""), 0)
            running.step(Started(), 0)

    def output(self, *tokens: int, finish: FinishReason | None = None) -> None:
        event = Output("s", Stage.WHOLE, 0, tokens, "x" * len(tokens), finish=finish)
        self.running.step(event, 0)


class Blocked:
    """A call whose client does not read."""

    def try_write(self, message: bytes) -> bool:
        return False

    async def write(self, message: Any) -> None:
        await asyncio.Event().wait()

    async def write_bytes(self, message: bytes) -> None:
        await asyncio.Event().wait()


async def test_a_handler_that_is_cancelled_after_the_deadline_ends_the_request() -> None:
    desk = Desk()
    desk.output(1)
    handler = asyncio.create_task(_send(desk.running, Blocked()))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert desk.running.buffer.on_cut is not None
    handler.cancel()
    await asyncio.wait({handler})
    assert desk.running.buffer.on_cut is None
    desk.clock.advance(DEADLINE + 1)
    desk.running.leave()
    assert [type(end) for end in desk.ends] == [DeadlineExceeded]


async def test_a_cut_that_fails_does_not_keep_the_request() -> None:
    desk = Desk()

    def cut() -> None:
        raise RuntimeError("the timeout was left")

    desk.running.buffer.on_cut = cut
    desk.clock.advance(DEADLINE + 1)
    desk.running.leave()
    assert [type(end) for end in desk.ends] == [DeadlineExceeded]


async def test_a_success_after_the_deadline_is_whole() -> None:
    desk = Desk()
    desk.clock.advance(DEADLINE + 1)
    desk.output(1, 2, finish=FinishReason.STOP)
    assert [type(end) for end in desk.ends] == [Completed]
    assert [d.token_ids async for batch in desk.running.deltas() for d in batch] == [(1, 2)]


async def test_an_error_before_the_deadline_comes_after_what_waits() -> None:
    desk = Desk()
    desk.output(1)
    desk.running.step(Abort(PdserveError("no more")))
    assert [d.token_ids for d in await desk.running.buffer.take()] == [(1,)]
