"""What a push is told, and what it tells: plain values."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.kv.generations import Stamp
from cluster.kv.geometry import Route
from cluster.kv.handoff import HandoffResult
from cluster.kv.milestones import Fence
from cluster.kv.transport.seam import Peer

FRAMES_A_STEP = 2
"""A step's blocks leave in as many frames at least, so that little is left when it ends …"""
LEAST_BYTES = 32 << 20
"""… unless they would be smaller than that: a frame takes the engine's own Python, too."""


def frame_size(most: int, step_bytes: int) -> int:
    """Of the frames in which a step's blocks cross, where none is larger than `most`."""
    return min(most, max(LEAST_BYTES, step_bytes // FRAMES_A_STEP))


@dataclass(frozen=True)
class Ready:
    """One layer of a run of the prompt's blocks has been computed, once `fence` is reached.

    Attributes:
        first_block: index in the prompt of the first of `block_ids`.
        stamp: the blocks' generations.
    """

    layer: int
    first_block: int
    block_ids: tuple[int, ...]
    stamp: Stamp
    fence: Fence | None

    def goes_on(self, other: Ready) -> bool:
        """`other` is the next layer of the same blocks."""
        return (
            other.layer == self.layer + 1
            and other.first_block == self.first_block
            and other.block_ids == self.block_ids
        )


@dataclass
class Sent:
    """What has crossed on this route. Stamps are CLOCK_MONOTONIC seconds."""

    transport: str = ""
    held_tokens: int = 0
    frames: int = 0
    bytes: int = 0
    granted_at: float = 0.0
    first_frame_at: float = 0.0
    last_frame_at: float = 0.0


@dataclass(frozen=True)
class Order:
    """What a push is to do.

    Attributes:
        plain: blocks cross in plain order (the sides' blocks differ).
    """

    handoff_id: str
    ticket: str
    num_tokens: int
    route: Route
    peer: Peer
    plain: bool


def result_of(handoff_id: str, sent: Sequence[Sent], error: str) -> HandoffResult:
    """Prefill's part of a handoff that has ended just now, over all routes of a rank."""
    result = HandoffResult(handoff_id, "prefill", error, ended_at=time.monotonic())
    if not sent:
        return result
    return replace(
        result,
        transport=sent[0].transport,
        bytes=sum(s.bytes for s in sent),
        frames=sum(s.frames for s in sent),
        held_tokens=min(s.held_tokens for s in sent),
        granted_at=max(s.granted_at for s in sent),
        first_frame_at=min((s.first_frame_at for s in sent if s.frames), default=0.0),
        last_frame_at=max(s.last_frame_at for s in sent),
    )
