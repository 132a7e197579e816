"""The whole face, which every worker has: prompt and all tokens here, nothing is handed off."""

from __future__ import annotations

import time

from cluster.engine.protocol import Engine, EngineRequest
from cluster.errors import InvalidRequest
from cluster.worker.sequence import Emit, SequenceReport, SequenceStart
from cluster.worker.stream import Stamps, stream


class WholeFace:
    """Serves sequences that stay on one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def run(self, start: SequenceStart, emit: Emit) -> None:
        if start.ticket:
            raise InvalidRequest("ticket", "a whole sequence is not handed off")
        stamps = Stamps(time.monotonic())
        request = EngineRequest(
            start.sequence_id, start.prompt_token_ids, start.sampling, start.cache_salt
        )

        async def report() -> SequenceReport:
            return stamps.report()

        await stream(self._engine, request, stamps, emit, report)
