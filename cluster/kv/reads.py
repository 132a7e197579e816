"""Whether a push reads what it was offered: looked at before blocks are read, and again as soon as
they have been."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.errors import HandoffRefused
from cluster.kv.generations import Generations, Stamp
from cluster.kv.milestones import Fence
from cluster.kv.orders import Ready
from cluster.kv.transport.seam import Outbound


@dataclass
class Reads:
    """Of one push, on the agent's event loop."""

    generations: Generations
    _still: dict[int, tuple[Stamp, int]] = field(default_factory=dict)
    _read: list[Ready] = field(default_factory=list)
    _filled: Fence | None = None
    _checks: asyncio.Task[None] | None = None

    def check(self, ready: Ready) -> None:
        """Raises HandoffRefused if a block of it was handed out anew since it was offered."""
        renewals = self.generations.renewals
        known = self._still.get(id(ready.stamp))
        if known is not None and known[1] == renewals:
            return
        if not self.generations.still(ready.block_ids, ready.stamp):
            raise HandoffRefused("blocks were handed out anew while they were read")
        self._still[id(ready.stamp)] = ready.stamp, renewals

    def check_behind(self, filled: Fence, ready: Ready, outbound: Outbound) -> None:
        """The same once `filled` is reached: a block may be another's soon afterwards, and be
        right. So it is with a sliding window, when the prompt goes on behind it."""
        self._read.append(ready)
        self._filled = filled
        if self._checks is None or (self._checks.done() and not self._checks.exception()):
            self._checks = asyncio.create_task(self._check(outbound))
            self._checks.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _check(self, outbound: Outbound) -> None:
        while self._read:
            read, self._read = self._read, []
            assert self._filled is not None
            await outbound.reached(self._filled)
            for ready in read:
                self.check(ready)

    async def checked(self) -> None:
        """Waits for what has been read so far. Raises HandoffRefused if it was not what was
        offered, or the way to the peer broke."""
        if self._checks is not None:
            await self._checks
