"""The credit book: prefill pins no more KV than decode has room for, and a bounded amount beyond.

Pure. Decode **grants** a handoff when it has reserved its blocks. What prefill computes for a
granted handoff can leave at once; what it computes ahead of a grant stays pinned until the grant
comes. The book **admits** a prompt if it is granted, or if all that was admitted ahead of a grant,
itself included, stays within `limit` bytes. A prompt that is not admitted waits in prefill's queue
and pins nothing.

Why this cannot deadlock. Wait edges: an unadmitted prompt waits for its own grant, or for the grant
or end of a prompt admitted ahead of its grant. A grant waits for free blocks on decode. Decode's
blocks are held by (a) decodes that run – they end by themselves, (b) reservations whose prompt is
granted: granted prompts are admitted whatever the limit says, so prefill computes them, they land,
and become (a). Nothing in (a) or (b) waits for a prompt that is not granted, so there is no cycle.

An engine that is both sides has one pool for both. Prompts ahead of their grants leave what lands
the blocks that it needs to go on (`landings.py`). But two such engines that hand off to each other
can fill their pools with reservations, each for a granted prompt that finds no block at the other.
That wait, as every other, ends with its ticket's lease.

`tests/property/test_credit.py` walks the model of both sides through random interleavings,
cancellations and losses.
"""

from __future__ import annotations


class CreditBook:
    """Prompts of one prefill engine between their arrival and the end of their handoff.

    Args:
        limit: bytes that may be pinned ahead of grants.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: set[str] = set()
        self._ahead: dict[str, int] = {}
        self._granted: set[str] = set()

    def arrive(self, handoff_id: str) -> None:
        """The prompt is in prefill's queue."""
        self._waiting.add(handoff_id)

    def has_credit(self, handoff_id: str, size: int) -> bool:
        """Would the prompt, of `size` bytes of KV, be admitted?"""
        known = handoff_id in self._granted or handoff_id in self._ahead
        return known or self.ahead_bytes + size <= self._limit

    def admit(self, handoff_id: str, size: int) -> bool:
        """May the prompt, of `size` bytes of KV, be computed now? Asking again is harmless."""
        if not self.has_credit(handoff_id, size):
            return False
        self._waiting.discard(handoff_id)
        if handoff_id not in self._granted:
            self._ahead.setdefault(handoff_id, size)
        return True

    def grant(self, handoff_id: str) -> None:
        """Decode has reserved its blocks. Later than `end` it is nothing."""
        if handoff_id in self._waiting or handoff_id in self._ahead:
            self._ahead.pop(handoff_id, None)
            self._granted.add(handoff_id)

    def granted(self, handoff_id: str) -> bool:
        """Decode has room for it."""
        return handoff_id in self._granted

    def end(self, handoff_id: str) -> None:
        """The handoff pins nothing any more, in whatever way it ended."""
        self._waiting.discard(handoff_id)
        self._ahead.pop(handoff_id, None)
        self._granted.discard(handoff_id)

    @property
    def ahead_bytes(self) -> int:
        """Admitted ahead of a grant."""
        return sum(self._ahead.values())

    @property
    def waiting(self) -> int:
        """Prompts in the queue that were not admitted yet."""
        return len(self._waiting)

    @property
    def empty(self) -> bool:
        return not (self._waiting or self._ahead or self._granted)
