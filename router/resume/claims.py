"""Claims of streams, and their undoing where nobody is left to run what was claimed.

A call may end while the store answers it: its client hung up, or the answer was lost. What it has
claimed would then have an owner that lives and does not serve it, and every repetition would wait
for tokens that do not come.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.errors import Unavailable
from cluster.store.streams import Holder, StreamName, Streams
from router.generation import Generation
from router.resume import codec

MAX_LEFT = 1024
"""Claims to be undone once the store answers; what comes beyond them expires in the store."""

RETRY_SECONDS = 0.5
PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class Claim:
    """A stream that this router is to serve, and the mark that tells this claim from others."""

    name: StreamName
    mark: str
    until: float


class Claims:
    """One router's claims.

    Args:
        streams: raises Unavailable where there are none.
        keep_seconds: how long a finished stream can be replayed.
    """

    def __init__(
        self, streams: Callable[[], Streams], owner: str, clock: Clock, keep_seconds: float
    ) -> None:
        self._streams = streams
        self._owner = owner
        self._clock = clock
        self._keep_seconds = keep_seconds
        self._left: dict[str, tuple[Claim, asyncio.Task[Holder] | None]] = {}
        self._undoing: asyncio.Task[None] | None = None

    async def claim(self, name: StreamName, generation: Generation) -> tuple[Holder, Claim]:
        """Begins a stream unless it was begun before; the claim is one only if `Holder.mine`.

        Raises:
            Unavailable: the store is out.
        """
        streams = self._streams()
        ttl = generation.deadline - self._clock.now() + self._keep_seconds
        claim = Claim(name, secrets.token_hex(8), self._clock.now() + ttl)
        asked = codec.asked(generation, self._clock)
        fingerprint = codec.fingerprint(generation)
        wall = self._clock.wall()
        asking = asyncio.create_task(
            streams.claim(name, asked, fingerprint, self._owner, claim.mark, ttl, wall)
        )
        try:
            return await asyncio.shield(asking), claim
        except BaseException:
            self._undo(claim, asking)
            raise

    async def forget(self, claim: Claim) -> None:
        """The request was refused, and may be asked again."""
        self._undo(claim, None)
        assert self._undoing is not None
        await asyncio.wait([self._undoing], timeout=PATIENCE_SECONDS)

    async def stop(self) -> None:
        """What is not undone yet is left to whoever finds its owner gone."""
        if self._undoing is not None:
            self._undoing.cancel()
            await asyncio.wait([self._undoing])

    def _undo(self, claim: Claim, asking: asyncio.Task[Holder] | None) -> None:
        if len(self._left) < MAX_LEFT:
            self._left[claim.mark] = claim, asking
        if self._undoing is None or self._undoing.done():
            self._undoing = asyncio.create_task(self._work(), name="claims undone")

    async def _work(self) -> None:
        while self._left:
            mark, (claim, asking) = next(iter(self._left.items()))
            if asking is not None:
                await asyncio.wait([asking])
            try:
                await self._streams().forget(claim.name, self._owner, mark)
            except Unavailable:
                if self._clock.now() < claim.until:
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
            del self._left[mark]
