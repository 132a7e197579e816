"""The ticket: one signed statement of which handoff may land where.

A router mints it when it places a request; the prefill worker shows it; the decode worker accepts
KV for nothing else. It names both workers by incarnation, so that a restarted peer cannot be
confused with its former self, the prompt by digest, so that KV of other tokens cannot land, and the
KV layout by fingerprint, so that bytes are never reinterpreted.

On the wire: `payload "." signature`, where payload is canonical JSON and signature its HMAC-SHA256
under the cluster's secret, in hex. The signature is checked before anything is parsed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from cluster.errors import HandoffRefused

CLOCK_TOLERANCE_SECONDS = 5.0
"""How far two hosts' wall clocks may differ."""

MAX_TICKET_BYTES = 4096

_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Ticket:
    """What a handoff is allowed to be.

    Attributes:
        handoff_id: unique, 128 random bits; also what the ledgers file it under.
        request_id: for logs and traces.
        prompt_digest: `prompt_digest()` of the prompt's token ids.
        num_tokens: prompt length in tokens.
        tenant_salt: the cache salt of the tenant; prefixes are shared only within it.
        layout: fingerprint of what both sides' KV has in common.
        prefill_geometry, decode_geometry: how each side cuts its KV cache into ranks and blocks.
        issued_at, expires_at: seconds since 1970.
    """

    handoff_id: str
    request_id: str
    model: str
    prefill_worker: str
    prefill_incarnation: str
    decode_worker: str
    decode_incarnation: str
    prompt_digest: str
    num_tokens: int
    tenant_salt: str
    layout: str
    prefill_geometry: str
    decode_geometry: str
    issued_at: float
    expires_at: float


_FIELDS = {
    f.name: (int if f.type == "int" else float if f.type == "float" else str)
    for f in fields(Ticket)
}


def new_handoff_id() -> str:
    """Draws a handoff id."""
    return secrets.token_hex(16)


def prompt_digest(token_ids: Sequence[int]) -> str:
    """BLAKE2b-128 over the token ids as little-endian uint32, in hex."""
    ids = array("I", token_ids)
    return hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()


class TicketSigner:
    """Signs and verifies tickets under one secret.

    Args:
        secret: at least 16 bytes, the same on every router and worker.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 16:
            raise ValueError("the cluster secret needs at least 16 bytes")
        # Keyed once: each signature goes on from a copy.
        self._keyed = hmac.new(secret, digestmod=hashlib.sha256)
        self._call_token = self._mac(b"pdserve internal call").decode()

    def sign(self, ticket: Ticket) -> bytes:
        """The ticket's wire form."""
        payload = _JSON.encode(vars(ticket)).encode()
        return payload + b"." + self._mac(payload)

    def verify(self, wire: bytes, now_wall: float) -> Ticket:
        """The ticket behind `wire`.

        Raises:
            HandoffRefused: it is malformed, not signed by this cluster, not yet valid or expired.
        """
        if len(wire) > MAX_TICKET_BYTES:
            raise HandoffRefused("ticket is too long")
        payload, dot, mac = wire.rpartition(b".")
        if not dot or not hmac.compare_digest(mac, self._mac(payload)):
            raise HandoffRefused("ticket is not signed by this cluster")
        ticket = _parse(payload)
        if now_wall >= ticket.expires_at:
            raise HandoffRefused("ticket has expired")
        if now_wall < ticket.issued_at - CLOCK_TOLERANCE_SECONDS:
            raise HandoffRefused("ticket is from the future: the hosts' clocks differ too much")
        return ticket

    def call_token(self) -> str:
        """What routers, workers and the controller show each other on internal calls."""
        return self._call_token

    def proof(self, statement: bytes) -> bytes:
        """What one process of the cluster states to another, signed."""
        return self._mac(b"pdserve statement\n" + statement)

    def proves(self, statement: bytes, proof: bytes) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(proof, self.proof(statement))

    def accepts_call_token(self, token: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(token.encode(), self.call_token().encode())

    def _mac(self, payload: bytes) -> bytes:
        mac = self._keyed.copy()
        mac.update(payload)
        return mac.hexdigest().encode()


def _parse(payload: bytes) -> Ticket:
    try:
        raw = json.loads(payload)
        if not isinstance(raw, dict) or raw.keys() != _FIELDS.keys():
            raise ValueError("fields")
        values: dict[str, Any] = {name: kind(raw[name]) for name, kind in _FIELDS.items()}
        return Ticket(**values)
    except (ValueError, TypeError) as error:
        raise HandoffRefused("ticket is malformed") from error
