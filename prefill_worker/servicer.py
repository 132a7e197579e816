"""The prefill face: compute a prompt, sample one token, hand the KV off."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace

from cluster.engine.protocol import Engine, EngineOutput, EngineRequest, Sampling
from cluster.errors import EngineFailed, HandoffRefused
from cluster.kv.handoff import HandoffParams, HandoffResult
from cluster.ticket import TicketSigner
from cluster.worker.sequence import Emit, Identity, SequenceReport, SequenceStart, SequenceStep
from cluster.worker.tickets import check_ticket
from prefill_worker.peers import Peers


class PrefillFace:
    """Serves the prefill stage of sequences on one engine."""

    def __init__(self, engine: Engine, me: Identity, signer: TicketSigner, peers: Peers) -> None:
        self._engine = engine
        self._me = me
        self._signer = signer
        self._peers = peers

    async def run(self, start: SequenceStart, emit: Emit) -> None:
        accepted = time.monotonic()
        handoff = await self._handoff(start) if start.ticket else None
        request = EngineRequest(
            start.sequence_id,
            start.prompt_token_ids,
            one_token(start.sampling),
            start.cache_salt,
            handoff,
        )
        if handoff is None:
            self._emit(start, accepted, await self._generate(request), emit)
            return
        self._engine.expect_handoff(handoff.handoff_id)
        push = asyncio.create_task(self._engine.handoff_result(handoff.handoff_id))
        try:
            self._emit(start, accepted, await self._unless_failed(push, request), emit)
        finally:
            push.cancel()
            await asyncio.gather(push, return_exceptions=True)
            self._engine.forget_handoff(handoff.handoff_id)

    async def _unless_failed(
        self, push: asyncio.Task[HandoffResult], request: EngineRequest
    ) -> EngineOutput:
        """The engine's only output, unless the handoff fails before it is there."""
        loop = asyncio.get_running_loop()

        def ended(push: asyncio.Task[HandoffResult]) -> None:
            if not push.cancelled() and (push.exception() or push.result().error):
                limit.reschedule(loop.time())

        try:
            async with asyncio.timeout(None) as limit:
                push.add_done_callback(ended)
                try:
                    return await self._generate(request)
                finally:
                    push.remove_done_callback(ended)
        except TimeoutError:
            raise HandoffRefused(push.result().error) from None

    def _emit(
        self, start: SequenceStart, accepted: float, output: EngineOutput, emit: Emit
    ) -> None:
        ended = output.finish_reason == "stop" or start.sampling.max_tokens == 1
        emit(
            SequenceStep(
                start.sequence_id,
                offset=0,
                token_ids=output.token_ids,
                # A stop string may begin in this text; only decode can tell.
                text=output.text if ended or not start.sampling.stop else "",
                logprobs=output.logprobs,
                finish_reason=output.finish_reason,
                stop=output.stop,
                report=SequenceReport(
                    accepted_at=accepted,
                    scheduled_at=output.scheduled_at,
                    first_token_at=time.monotonic(),
                    cached_tokens=output.cached_tokens,
                ),
            )
        )

    async def _handoff(self, start: SequenceStart) -> HandoffParams:
        ticket = check_ticket(self._signer, self._me, "prefill", start)
        peer = await self._peers.find(ticket.decode_worker, ticket.decode_incarnation)
        return HandoffParams(
            side="prefill",
            handoff_id=ticket.handoff_id,
            ticket=start.ticket.decode(),
            num_tokens=ticket.num_tokens,
            expires_in=ticket.expires_at - time.time(),
            peers=peer.transfer_addresses,
            peer_worker=ticket.decode_worker,
            peer_incarnation=ticket.decode_incarnation,
            peer_geometry=ticket.decode_geometry,
        )

    async def _generate(self, request: EngineRequest) -> EngineOutput:
        async with aclosing(self._engine.generate(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if output.finish_reason == "error":
                    raise EngineFailed("the prefill engine could not run the request")
                return output
        raise EngineFailed("the prefill engine gave no token")


def one_token(sampling: Sampling) -> Sampling:
    """The same draw, of the first token only.

    min_tokens matters to the first token only as "may it be the last", which 1 says as well.
    """
    return replace(sampling, max_tokens=1, min_tokens=min(sampling.min_tokens, 1))
