"""Identities: short, sortable enough to read, unique enough to trust."""

from __future__ import annotations

import re
import secrets
from typing import NewType

WorkerId = NewType("WorkerId", str)
"""Stable name of a worker slot, such as `recall-tiny-prefill-0`; survives restarts."""

Incarnation = NewType("Incarnation", str)
"""One life of a worker: a new one is drawn at every start."""

RequestId = NewType("RequestId", str)
"""One client request; chosen by the client or drawn by the router."""

SequenceId = NewType("SequenceId", str)
"""One attempt at one completion of a request, as workers know it."""

REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def new_incarnation() -> Incarnation:
    """Draws an incarnation: 64 random bits."""
    return Incarnation(secrets.token_hex(8))


def new_request_id() -> RequestId:
    """Draws a request id: 96 random bits."""
    return RequestId("req-" + secrets.token_hex(12))


def sequence_id(request: RequestId, index: int, attempt: int, nonce: str) -> SequenceId:
    """The id of an attempt at completion `index` of `request`.

    `nonce` is the router's own, so that two clients that chose the same request id never collide on
    a worker.
    """
    return SequenceId(f"{request}/{index}.{attempt}.{nonce}")
