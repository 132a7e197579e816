"""Minting of tickets: what binds a sequence's prefill to its decode."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.clock import Clock
from cluster.ticket import Ticket, TicketSigner, new_handoff_id
from router.generation import Generation
from router.placement import Plan


@dataclass(frozen=True)
class Cuts:
    """What both workers' KV has in common, and how each cuts it into ranks and blocks."""

    layout: str = ""
    prefill_geometry: str = ""
    decode_geometry: str = ""


class TicketMint:
    """Signs a ticket per attempt.

    Args:
        seconds: its life.
    """

    def __init__(self, signer: TicketSigner, clock: Clock, seconds: float) -> None:
        self._signer = signer
        self._clock = clock
        self._seconds = seconds

    def mint(
        self,
        generation: Generation,
        prompt_digest: str,
        plan: Plan,
        cuts: Cuts,
    ) -> bytes:
        """The signed ticket for `plan`; empty if it hands nothing off.

        Args:
            cuts: of the KV on both workers.
        """
        if plan.prefill is None or plan.decode is None:
            return b""
        issued_at = self._clock.wall()
        ticket = Ticket(
            handoff_id=new_handoff_id(),
            request_id=generation.request_id,
            model=generation.model,
            prefill_worker=plan.prefill.worker_id,
            prefill_incarnation=plan.prefill.incarnation,
            decode_worker=plan.decode.worker_id,
            decode_incarnation=plan.decode.incarnation,
            prompt_digest=prompt_digest,
            num_tokens=len(generation.prompt_token_ids),
            tenant_salt=generation.cache_salt,
            layout=cuts.layout,
            prefill_geometry=cuts.prefill_geometry,
            decode_geometry=cuts.decode_geometry,
            issued_at=issued_at,
            expires_at=issued_at + self._seconds,
        )
        return self._signer.sign(ticket)
