"""A worker's check that a ticket is for it, and for this very prompt."""

from __future__ import annotations

import time

from cluster.errors import HandoffRefused
from cluster.kv.handoff import Side
from cluster.ticket import Ticket, TicketSigner, prompt_digest
from cluster.worker.sequence import Identity, SequenceStart


def check_ticket(signer: TicketSigner, me: Identity, side: Side, start: SequenceStart) -> Ticket:
    """The verified ticket of `start`.

    Raises:
        HandoffRefused: the signature, the expiry, a worker, an incarnation, the layout or the
            prompt is not what the ticket says.
    """
    ticket = signer.verify(start.ticket, time.time())
    if side == "prefill":
        named = (ticket.prefill_worker, ticket.prefill_incarnation)
    else:
        named = (ticket.decode_worker, ticket.decode_incarnation)
    if named != (me.worker_id, me.incarnation):
        raise HandoffRefused("the ticket is for another worker or another life of this one")
    if ticket.layout != me.layout:
        raise HandoffRefused("the ticket is for another KV layout")
    if ticket.tenant_salt != start.cache_salt:
        raise HandoffRefused("the ticket is for another tenant")
    if ticket.num_tokens != len(start.prompt_token_ids) or ticket.prompt_digest != prompt_digest(
        start.prompt_token_ids
    ):
        raise HandoffRefused("the ticket is for another prompt")
    return ticket
