"""The decode face: take the KV over, go on after the first token."""

from __future__ import annotations

import asyncio
import time

from cluster.engine.protocol import Engine, EngineRequest
from cluster.errors import EngineFailed, HandoffRefused
from cluster.kv.handoff import HandoffParams, HandoffResult
from cluster.ticket import TicketSigner
from cluster.worker.sequence import Emit, Identity, SequenceReport, SequenceStart
from cluster.worker.stream import Stamps, stream
from cluster.worker.tickets import check_ticket

RESULT_SECONDS = 5.0
"""A result comes with the engine step in which its request goes on; more is never."""


class DecodeFace:
    """Serves the decode stage of sequences on one engine."""

    def __init__(self, engine: Engine, me: Identity, signer: TicketSigner) -> None:
        self._engine = engine
        self._me = me
        self._signer = signer

    async def run(self, start: SequenceStart, emit: Emit) -> None:
        stamps = Stamps(time.monotonic())
        handoff = self._handoff(start)
        request = EngineRequest(
            start.sequence_id, start.prompt_token_ids, start.sampling, start.cache_salt, handoff
        )

        async def report() -> SequenceReport:
            return stamps.report(await self._result(handoff))

        self._engine.expect_handoff(handoff.handoff_id)
        try:
            await stream(self._engine, request, stamps, emit, report)
        except EngineFailed:
            # vLLM says only that a request failed; the handoff's result says why.
            result = await self._result(handoff)
            if result is not None and not result.ok:
                raise HandoffRefused(result.error) from None
            raise
        finally:
            self._engine.forget_handoff(handoff.handoff_id)

    def _handoff(self, start: SequenceStart) -> HandoffParams:
        ticket = check_ticket(self._signer, self._me, "decode", start)
        return HandoffParams(
            side="decode",
            handoff_id=ticket.handoff_id,
            ticket=start.ticket.decode(),
            num_tokens=ticket.num_tokens,
            expires_in=ticket.expires_at - time.time(),
        )

    async def _result(self, handoff: HandoffParams) -> HandoffResult | None:
        """How the handoff ended; None if the engine has nothing to say of it."""
        try:
            async with asyncio.timeout(RESULT_SECONDS):
                return await self._engine.handoff_result(handoff.handoff_id)
        except TimeoutError:
            return None
