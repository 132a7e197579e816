"""The states of a completion, and of a request, in the order in which it gets on."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a completion is."""

    RECEIVED = "received"
    ADMITTED = "admitted"
    PLACED = "placed"
    PREFILLING = "prefilling"
    FIRST_TOKEN = "first_token"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})
