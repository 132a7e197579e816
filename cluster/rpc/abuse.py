"""What a peer may not do: ping without need, reset streams faster than they can matter. Pure."""

from __future__ import annotations

PING_SECONDS = 10.0
"""Clients may ping this often to find a dead router; more is taken for abuse."""

PING_STRIKES = 2
RESETS_A_SECOND = 1000
"""Streams that a peer may open only to cancel them; see CVE-2023-44487."""


class Abuse:
    """One connection's account. Times in seconds of one clock."""

    def __init__(self) -> None:
        self._pinged_at = float("-inf")
        self._strikes = 0
        self._second = 0
        self._resets = 0

    def answered(self) -> None:
        """A call was sent something: pings that measure its round trip are welcome again."""
        self._strikes = 0
        self._pinged_at = float("-inf")

    def pinged(self, now: float) -> bool:
        """False: too often."""
        if now - self._pinged_at < PING_SECONDS:
            self._strikes += 1
        self._pinged_at = now
        return self._strikes <= PING_STRIKES

    def reset(self, now: float) -> bool:
        """The peer gave a stream up. False: too often."""
        if int(now) != self._second:
            self._second, self._resets = int(now), 0
        self._resets += 1
        return self._resets <= RESETS_A_SECOND
