"""A handoff between two engines: the ticket, and each side's parameters."""

from __future__ import annotations

import time
from array import array

from cluster.engine.protocol import EngineInfo
from cluster.kv.handoff import HandoffParams
from cluster.ticket import Ticket, TicketSigner, new_handoff_id, prompt_digest

LEASE_SECONDS = 60.0


def pair(
    prefill: tuple[str, EngineInfo],
    decode: tuple[str, EngineInfo],
    prompt: array[int],
    secret: bytes,
) -> tuple[HandoffParams, HandoffParams]:
    """What a router would tell both sides; `prefill` and `decode` are worker ids and engines."""
    now = time.time()
    ticket = Ticket(
        handoff_id=new_handoff_id(),
        request_id="bench",
        model="bench",
        prefill_worker=prefill[0],
        prefill_incarnation=f"{prefill[0]}-1",
        decode_worker=decode[0],
        decode_incarnation=f"{decode[0]}-1",
        prompt_digest=prompt_digest(prompt),
        num_tokens=len(prompt),
        tenant_salt="",
        layout=decode[1].layout,
        prefill_geometry=prefill[1].geometry,
        decode_geometry=decode[1].geometry,
        issued_at=now,
        expires_at=now + LEASE_SECONDS,
    )
    wire = TicketSigner(secret).sign(ticket).decode()
    common = (ticket.handoff_id, wire, len(prompt), LEASE_SECONDS)
    peer = (decode[1].transfer_addresses, decode[0], f"{decode[0]}-1", decode[1].geometry)
    return HandoffParams("prefill", *common, *peer), HandoffParams("decode", *common)
