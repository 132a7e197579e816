"""What either end takes from one connection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes.

    Attributes:
        message_bytes: of a message, also when it is decompressed.
        calls: that a client has open at once.
        metadata_bytes: of a call, as HTTP/2 counts them.
        window_bytes: that may come of a call before its method takes them.
        keepalive_seconds: of silence after which the peer is asked whether it is there.
        keepalive_timeout_seconds: that it has to answer.
    """

    message_bytes: int
    calls: int
    metadata_bytes: int = 16 << 10
    window_bytes: int = 1 << 20
    keepalive_seconds: float = 60.0
    keepalive_timeout_seconds: float = 20.0
