"""Which workers to leave alone for a while: those that fail, or stand out from the rest. Pure.

A worker whose sequences fail one after the other is ejected, for longer each time; then one
sequence at a time tries it again, and the first that succeeds takes it back. So is a worker whose
failures of late stand out from the pool's. Never more than MAX_EJECTED of a pool are out at once:
when everything fails it is not the workers' fault, and a doubtful worker is better than none.
"""

from __future__ import annotations

from dataclasses import dataclass

CONSECUTIVE = 3
"""Failures in a row that eject."""

OUTLIER_RATE = 0.3
"""So much above the pool's rate of failures ejects, once MIN_SEEN sequences were seen."""

MIN_SEEN = 10.0
MEMORY = 0.95
"""What a sequence's weight becomes with the next one."""

FIRST_REST_SECONDS, MAX_REST_SECONDS = 2.0, 60.0
MAX_EJECTED = 0.5


@dataclass
class _Record:
    """One worker: failures in a row, and weights of what was seen and of what failed."""

    consecutive: int = 0
    seen: float = 0.0
    failed: float = 0.0
    rest: float = FIRST_REST_SECONDS
    until: float = 0.0
    trying: bool = False

    @property
    def out(self) -> bool:
        return self.until > 0.0


class Breaker:
    """The workers of one pool by slot."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}

    def join(self, slot: int) -> None:
        """A new life, without a past."""
        self._records[slot] = _Record()

    def leave(self, slot: int) -> None:
        self._records.pop(slot, None)

    def started(self, now: float, slot: int) -> None:
        """A sequence was put on it; the one that tries an ejected worker keeps others away."""
        record = self._records.get(slot)
        if record is not None and record.out:
            record.trying = True
            record.until = max(record.until, now + record.rest)

    def succeeded(self, slot: int) -> bool:
        """Its first token came, or it ended well; True if that brings the worker back."""
        record = self._records.get(slot)
        if record is None:
            return False
        record.consecutive = 0
        record.seen, record.failed = record.seen * MEMORY + 1.0, record.failed * MEMORY
        if not record.out:
            return False
        self._records[slot] = _Record()
        return True

    def failed(self, now: float, slot: int, shared: bool = False) -> bool:
        """A sequence failed there; True if the worker is ejected from now on.

        Args:
            shared: a handoff failed, so that the fault may be another worker's: it counts towards
                the rate, in which a bad worker stands out from its peers, but not as one in a row.
        """
        record = self._records.get(slot)
        if record is None:
            return False
        record.consecutive += not shared
        record.seen, record.failed = record.seen * MEMORY + 1.0, record.failed * MEMORY + 1.0
        if record.out:
            if record.trying:
                record.trying = False
                record.rest = min(MAX_REST_SECONDS, 2 * record.rest)
                record.until = now + record.rest
            return True
        if not self._stands_out(slot, record) or not self._may_eject():
            return False
        record.until = now + record.rest
        return True

    def due(self, now: float) -> list[int]:
        """Ejected workers that a sequence may try now."""
        return [s for s, record in self._records.items() if record.out and now >= record.until]

    def ejected(self, slot: int) -> bool:
        record = self._records.get(slot)
        return record is not None and record.out

    def _stands_out(self, slot: int, record: _Record) -> bool:
        if record.consecutive >= CONSECUTIVE:
            return True
        if record.seen < MIN_SEEN:
            return False
        others = [r for s, r in self._records.items() if s != slot]
        seen = sum(r.seen for r in others)
        pool = sum(r.failed for r in others) / seen if seen else 0.0
        return record.failed / record.seen > pool + OUTLIER_RATE

    def _may_eject(self) -> bool:
        out = sum(record.out for record in self._records.values())
        return out + 1 <= max(1, MAX_EJECTED * len(self._records)) and len(self._records) > 1
