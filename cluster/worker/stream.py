"""A sequence's outputs from the engine to the router, with the stamps that its report needs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from cluster.engine.protocol import Engine, EngineOutput, EngineRequest
from cluster.errors import EngineFailed
from cluster.kv.handoff import HandoffResult
from cluster.worker.sequence import Emit, SequenceReport, SequenceStep


class Stamps:
    """When a sequence passed which point; CLOCK_MONOTONIC seconds.

    Args:
        accepted: the worker took it.
    """

    def __init__(self, accepted: float) -> None:
        self._accepted = accepted
        self._scheduled = 0.0
        self._first = 0.0
        self._second = 0.0
        self._cached = 0

    def see(self, output: EngineOutput, offset: int) -> None:
        """An output whose first token is at `offset`."""
        now = time.monotonic()
        self._scheduled = output.scheduled_at or self._scheduled
        self._cached = max(self._cached, output.cached_tokens)
        self._first = self._first or now
        if not self._second and offset + len(output.token_ids) > 1:
            self._second = now

    def report(self, handoff: HandoffResult | None = None) -> SequenceReport:
        """Taken with the last output."""
        return SequenceReport(
            accepted_at=self._accepted,
            landed_at=handoff.ended_at if handoff else 0.0,
            scheduled_at=max(self._scheduled, handoff.ended_at if handoff else 0.0),
            first_token_at=self._first,
            second_token_at=self._second,
            cached_tokens=self._cached,
            handoff=handoff,
        )


async def stream(
    engine: Engine,
    request: EngineRequest,
    stamps: Stamps,
    emit: Emit,
    report: Callable[[], Awaitable[SequenceReport]],
) -> None:
    """Emits a request's outputs to its end; `report` is asked for with the last one.

    Raises:
        EngineFailed: the engine could not run it.
    """
    offset = 0
    async with aclosing(engine.generate(request)) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            if output.finish_reason == "error":
                raise EngineFailed("the engine could not run the request")
            stamps.see(output, offset)
            last = output.finish_reason is not None
            emit(
                SequenceStep(
                    request.sequence_id,
                    offset,
                    output.token_ids,
                    output.text,
                    output.logprobs,
                    output.finish_reason,
                    output.stop,
                    report=await report() if last else None,
                )
            )
            offset += len(output.token_ids)
