"""Handoff results by handoff, as they come out of the engine's ranks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from cluster.kv.handoff import HandoffResult


@dataclass
class _Expected:
    parts: list[HandoffResult] = field(default_factory=list)
    whole: asyncio.Event = field(default_factory=asyncio.Event)


class HandoffResults:
    """Joins the parts of every rank: bytes add up, the first error counts.

    Only what is expected is kept, so a result that comes after its request has ended is no burden.

    Args:
        ranks: parts that make a whole.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._expected: dict[str, _Expected] = {}

    def expect(self, handoff_id: str) -> None:
        """Keeps what comes of this handoff until `forget`."""
        self._expected[handoff_id] = _Expected()

    def add(self, part: HandoffResult) -> None:
        """A rank's part; any rank's failure makes the whole a failure at once."""
        expected = self._expected.get(part.handoff_id)
        if expected is not None:
            expected.parts.append(part)
            if part.error or len(expected.parts) >= self._ranks:
                expected.whole.set()

    async def wait(self, handoff_id: str) -> HandoffResult:
        """The joined result of an expected handoff. Raises KeyError for another one."""
        expected = self._expected[handoff_id]
        await expected.whole.wait()
        return _join(expected.parts)

    def forget(self, handoff_id: str) -> None:
        self._expected.pop(handoff_id, None)

    def __len__(self) -> int:
        return len(self._expected)


def _join(parts: list[HandoffResult]) -> HandoffResult:
    first = parts[0]
    return replace(
        first,
        error=next((part.error for part in parts if part.error), ""),
        bytes=sum(part.bytes for part in parts),
        frames=sum(part.frames for part in parts),
        granted_at=min(part.granted_at for part in parts),
        first_frame_at=min(part.first_frame_at for part in parts),
        last_frame_at=max(part.last_frame_at for part in parts),
        ended_at=max(part.ended_at for part in parts),
    )
