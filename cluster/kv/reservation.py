"""One request's reserved blocks on decode, until its KV has landed or is given up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.kv.assembly import Assembly
from cluster.kv.generations import Stamp
from cluster.kv.handoff import HandoffResult


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
        writing: payloads that are being written now.
        error: why it ended; empty while it stands, and when it ended well.
    """

    reserve: Reserve
    stamp: Stamp
    expiry: asyncio.TimerHandle
    granted_at: float
    owed_blocks: int
    parts: dict[int, Assembly] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)
    first_token: int | None = None
    transport: str = ""
    writing: int = 0
    error: str = ""
    first_frame_at: float = 0.0
    last_frame_at: float = 0.0

    @property
    def whole(self) -> bool:
        """Every route has committed."""
        return bool(self.parts) and self.committed == self.parts.keys()

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
