"""The decode face: take the KV over, go on after the first token. Also serves whole sequences."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from cluster.engine.protocol import Engine, EngineOutput, EngineRequest
from cluster.errors import EngineFailed, HandoffRefused, InvalidRequest, PdserveError
from cluster.kv.handoff import HandoffParams, HandoffResult
from cluster.ticket import TicketSigner
from cluster.worker.sequence import Emit, Identity, SequenceReport, SequenceStart, SequenceStep
from cluster.worker.tickets import check_ticket

RESULT_SECONDS = 5.0
"""A result comes with the engine step in which its request goes on; more is never."""


class DecodeFace:
    """Serves the decode stage, and sequences that stay whole, on one engine."""

    def __init__(self, engine: Engine, me: Identity, signer: TicketSigner) -> None:
        self._engine = engine
        self._me = me
        self._signer = signer

    async def run(self, start: SequenceStart, emit: Emit) -> None:
        accepted = time.monotonic()
        handoff = self._handoff(start)
        request = EngineRequest(
            start.sequence_id, start.prompt_token_ids, start.sampling, start.cache_salt, handoff
        )
        if handoff is not None:
            self._engine.expect_handoff(handoff.handoff_id)
        try:
            await self._stream(request, accepted, emit)
        finally:
            if handoff is not None:
                self._engine.forget_handoff(handoff.handoff_id)

    def _handoff(self, start: SequenceStart) -> HandoffParams | None:
        if start.stage == "whole":
            if start.ticket:
                raise InvalidRequest("ticket", "a whole sequence is not handed off")
            return None
        ticket = check_ticket(self._signer, self._me, "decode", start)
        return HandoffParams(
            side="decode",
            handoff_id=ticket.handoff_id,
            ticket=start.ticket.decode(),
            num_tokens=ticket.num_tokens,
            expires_in=ticket.expires_at - time.time(),
        )

    async def _stream(self, request: EngineRequest, accepted: float, emit: Emit) -> None:
        stamps = _Stamps(accepted)
        offset = 0
        async with aclosing(self._engine.generate(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if output.finish_reason == "error":
                    raise await self._why(request)
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
                        report=await self._report(request, stamps) if last else None,
                    )
                )
                offset += len(output.token_ids)

    async def _report(self, request: EngineRequest, stamps: _Stamps) -> SequenceReport:
        return stamps.report(await self._result(request), self._me.transport)

    async def _why(self, request: EngineRequest) -> PdserveError:
        """vLLM says only that a request failed; the handoff's result says why."""
        result = await self._result(request)
        if result is None or result.ok:
            return EngineFailed("the decode engine could not run the request")
        return HandoffRefused(result.error)

    async def _result(self, request: EngineRequest) -> HandoffResult | None:
        """How the handoff ended; None if there was none, or the engine has nothing to say of it."""
        if request.handoff is None:
            return None
        try:
            async with asyncio.timeout(RESULT_SECONDS):
                return await self._engine.handoff_result(request.handoff.handoff_id)
        except TimeoutError:
            return None


class _Stamps:
    def __init__(self, accepted: float) -> None:
        self._accepted = accepted
        self._scheduled = 0.0
        self._first = 0.0
        self._second = 0.0
        self._cached = 0

    def see(self, output: EngineOutput, offset: int) -> None:
        now = time.monotonic()
        self._scheduled = output.scheduled_at or self._scheduled
        self._cached = max(self._cached, output.cached_tokens)
        self._first = self._first or now
        if not self._second and offset + len(output.token_ids) > 1:
            self._second = now

    def report(self, handoff: HandoffResult | None, transport: str) -> SequenceReport:
        return SequenceReport(
            accepted_at=self._accepted,
            landed_at=handoff.ended_at if handoff else 0.0,
            scheduled_at=max(self._scheduled, handoff.ended_at if handoff else 0.0),
            first_token_at=self._first,
            second_token_at=self._second,
            cached_tokens=self._cached,
            handoff=handoff,
            transport=transport if handoff else "",
        )
