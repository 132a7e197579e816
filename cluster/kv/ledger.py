"""The ledger: every pinned KV byte has one owner, a reason and a lease.

Pure: takes `now`, holds no clock. One ledger per engine rank, owned by its handoff agent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Reason = Literal["sending", "reserved"]
HISTORY = 16


@dataclass(frozen=True)
class LedgerEntry:
    """What one handoff pins on this side.

    Attributes:
        handoff_id: the owner, named by its ticket.
        reason: sending (prefill keeps blocks until they are acknowledged), reserved (decode took
            blocks, KV is on its way).
        lease_expires: on the ledger's clock, seconds.
        history: what happened to it, last of all the newest; bounded.
    """

    handoff_id: str
    reason: Reason
    blocks: int
    bytes: int
    lease_expires: float
    history: tuple[str, ...] = ()

    def noted(self, now: float, event: str) -> LedgerEntry:
        return replace(self, history=(*self.history[-HISTORY + 1 :], f"{now:.3f} {event}"))


class LedgerError(RuntimeError):
    """The ledger and the world disagree: a bug, never a user's fault."""


class Ledger:
    """Entries by handoff id.

    Attributes:
        leaked_blocks: blocks whose entries had to be reclaimed since the start; 0 but for bugs.
    """

    def __init__(self) -> None:
        self._entries: dict[str, LedgerEntry] = {}
        self.leaked_blocks = 0

    def pin(self, entry: LedgerEntry, now: float) -> None:
        """Adds an entry. Raises LedgerError if the handoff pins something already."""
        if entry.handoff_id in self._entries:
            raise LedgerError(f"handoff {entry.handoff_id} is pinned twice")
        self._entries[entry.handoff_id] = entry.noted(now, f"pinned {entry.blocks} blocks")

    def grow(self, handoff_id: str, blocks: int, size: int, now: float) -> None:
        """A prefill chunk pinned more blocks of a handoff."""
        entry = self._entries[handoff_id]
        grown = replace(entry, blocks=entry.blocks + blocks, bytes=entry.bytes + size)
        self._entries[handoff_id] = grown.noted(now, f"pinned {blocks} more")

    def note(self, handoff_id: str, event: str, now: float) -> None:
        """Something happened to an entry, if it is there."""
        if entry := self._entries.get(handoff_id):
            self._entries[handoff_id] = entry.noted(now, event)

    def unpin(self, handoff_id: str) -> bool:
        """Removes an entry; False if there was none."""
        return self._entries.pop(handoff_id, None) is not None

    def reclaim(self, handoff_id: str) -> LedgerEntry | None:
        """Removes an entry that nobody will remove: counted as leaked."""
        entry = self._entries.pop(handoff_id, None)
        if entry is not None:
            self.leaked_blocks += entry.blocks
        return entry

    def strays(self, live_handoffs: set[str], now: float, grace: float) -> list[LedgerEntry]:
        """Entries that no live handoff owns, or whose lease ended more than `grace` ago."""
        return [
            entry
            for entry in self._entries.values()
            if entry.handoff_id not in live_handoffs or entry.lease_expires + grace < now
        ]

    def entries(self) -> list[LedgerEntry]:
        """A snapshot."""
        return list(self._entries.values())

    def check_integrity(self, live_handoffs: set[str]) -> None:
        """Raises LedgerError if an entry has no live handoff, or a live one no entry."""
        if self._entries.keys() != live_handoffs:
            stray = sorted(self._entries.keys() ^ live_handoffs)
            raise LedgerError(f"ledger and handoffs differ: {', '.join(stray)}")
