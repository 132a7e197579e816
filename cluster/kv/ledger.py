"""The ledger: every pinned KV byte has one owner, a reason and a lease.

Pure: takes `now`, holds no clock. One ledger per engine rank, owned by its handoff agent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Reason = Literal["sending", "reserved"]


@dataclass(frozen=True)
class LedgerEntry:
    """What one handoff pins on this side.

    Attributes:
        reason: sending (prefill keeps blocks until they are acknowledged), reserved (decode took
            blocks, KV is on its way).
        lease_expires: on the ledger's clock, seconds.
    """

    handoff_id: str
    reason: Reason
    blocks: int
    bytes: int
    lease_expires: float


class LedgerError(RuntimeError):
    """The ledger and the world disagree: a bug, never a user's fault."""


class Ledger:
    """Entries by handoff id."""

    def __init__(self) -> None:
        self._entries: dict[str, LedgerEntry] = {}

    def pin(self, entry: LedgerEntry) -> None:
        """Adds an entry. Raises LedgerError if the handoff pins something already."""
        if entry.handoff_id in self._entries:
            raise LedgerError(f"handoff {entry.handoff_id} is pinned twice")
        self._entries[entry.handoff_id] = entry

    def grow(self, handoff_id: str, blocks: int, size: int) -> None:
        """A prefill chunk pinned more blocks of a handoff."""
        entry = self._entries[handoff_id]
        self._entries[handoff_id] = replace(
            entry, blocks=entry.blocks + blocks, bytes=entry.bytes + size
        )

    def unpin(self, handoff_id: str) -> bool:
        """Removes an entry; False if there was none."""
        return self._entries.pop(handoff_id, None) is not None

    def expired(self, now: float) -> list[LedgerEntry]:
        """Entries whose lease is over."""
        return [entry for entry in self._entries.values() if entry.lease_expires <= now]

    def entries(self) -> list[LedgerEntry]:
        """A snapshot."""
        return list(self._entries.values())

    def pinned_blocks(self) -> int:
        """Blocks pinned now."""
        return sum(entry.blocks for entry in self._entries.values())

    def check_integrity(self, live_handoffs: set[str]) -> None:
        """Raises LedgerError if an entry has no live handoff, or a live one no entry."""
        if self._entries.keys() != live_handoffs:
            stray = sorted(self._entries.keys() ^ live_handoffs)
            raise LedgerError(f"ledger and handoffs differ: {', '.join(stray)}")
