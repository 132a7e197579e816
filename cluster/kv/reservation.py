"""One request's reserved blocks on decode, until its KV has landed or is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import HandoffRefused
from cluster.kv.assembly import Assembly
from cluster.kv.generations import Generations, Stamp
from cluster.kv.handoff import HandoffResult
from cluster.kv.milestones import Fence

LATE = "the lease ran out before every block had arrived"


class CalledOff(HandoffRefused):
    """Refused because the request has ended meanwhile, as when a client goes away."""


@dataclass(frozen=True)
class Reserve:
    """The engine took blocks for a request and waits for its KV.

    Attributes:
        block_ids: of the whole prompt, in order.
        held_tokens: the first of the prompt, already there from the prefix cache, in whole blocks.
        expires_in: seconds until the reservation is given up.
    """

    request: str
    handoff_id: str
    ticket: str
    num_tokens: int
    block_ids: tuple[int, ...]
    held_tokens: int
    expires_in: float


@dataclass
class Reservation:
    """Owned by the receiver.

    Attributes:
        stamp: the blocks' generations when they were reserved.
        owed_blocks: blocks that are not held.
        parts: what each route owes, by prefill rank; made with the first push.
        committed: prefill ranks whose part is verified.
        free: once it is reached, no step that was queued before the reservation can still write to
            the blocks; None: there is none.
        writing: payloads that are being written now.
        error: why it ended; empty while it stands, and when it ended well.
        pushes: those under way.
    """

    reserve: Reserve
    stamp: Stamp
    expiry: asyncio.TimerHandle
    granted_at: float
    owed_blocks: int
    free: Fence | None = None
    parts: dict[int, Assembly] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)
    first_token: int | None = None
    transport: str = ""
    writing: int = 0
    error: str = ""
    pushes: set[asyncio.Timeout] = field(default_factory=set)
    first_frame_at: float = 0.0
    last_frame_at: float = 0.0

    def __post_init__(self) -> None:
        self._ids = np.asarray(self.reserve.block_ids, dtype=np.int64)
        self._checked = -1

    @property
    def whole(self) -> bool:
        """Every route has committed."""
        return bool(self.parts) and self.committed == self.parts.keys()

    @asynccontextmanager
    async def push(self, seconds: float) -> AsyncIterator[None]:
        """What is done inside is broken off when the reservation fails, or after `seconds`: a push
        whose peer is silent hears of it, too, and keeps its stream no longer.

        Raises:
            HandoffRefused: it was broken off.
        """
        lease = asyncio.timeout(seconds)
        try:
            async with lease:
                self.pushes.add(lease)
                yield
        except TimeoutError:
            raise CalledOff(self.error) if self.error else HandoffRefused(LATE) from None
        finally:
            self.pushes.discard(lease)

    def end(self, error: str) -> None:
        """Every push learns of an error."""
        self.error = error
        self.expiry.cancel()
        for push in self.pushes if error else ():
            if not push.expired():
                push.reschedule(0)

    def check(self, generations: Generations) -> None:
        """Raises HandoffRefused unless it stands and its blocks are still the ones reserved."""
        if self.error:
            raise CalledOff(self.error)
        if (renewals := generations.renewals) == self._checked:
            return  # as with the last one: it is asked for every part of a payload
        if not generations.still(self._ids, self.stamp):
            raise HandoffRefused("decode's blocks were handed out anew before their KV arrived")
        self._checked = renewals

    def saw_frame(self, now: float) -> None:
        self.last_frame_at = now
        self.first_frame_at = self.first_frame_at or now

    def result(self, now: float) -> HandoffResult:
        return HandoffResult(
            handoff_id=self.reserve.handoff_id,
            side="decode",
            error=self.error,
            transport=self.transport,
            bytes=sum(part.bytes for part in self.parts.values()),
            frames=sum(part.frames for part in self.parts.values()),
            blocks=self.owed_blocks,
            held_tokens=self.reserve.held_tokens,
            granted_at=self.granted_at,
            first_frame_at=self.first_frame_at,
            last_frame_at=self.last_frame_at,
            ended_at=now,
        )
