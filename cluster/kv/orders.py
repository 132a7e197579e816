"""What a push is told, and what it tells: plain values."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.kv.generations import Stamp
from cluster.kv.geometry import Route
from cluster.kv.handoff import HandoffResult
from cluster.kv.milestones import Fence
from cluster.kv.transport.seam import Peer

LEAST_BYTES = 32 << 20
"""Of a frame, and of what the agent is told at once: each takes the engine's own Python."""
LEAST_BURST_BYTES = 64 << 20
"""Each takes some of the engine's compute besides."""


def told_size(most: int, step_bytes: int) -> int:
    """After how many bytes of a step's KV the agent is told of them, where a frame has `most`."""
    return min(most, max(LEAST_BYTES, step_bytes // 8))


def frame_size(most: int, step_bytes: int) -> int:
    """Of the frames in which a step's KV leaves as it is computed, where none is larger than
    `most`: two at least, unless they would be small, so that little is left when it ends."""
    return min(most, max(LEAST_BYTES, step_bytes // 2))


def leaves_behind(layer: int, num_layers: int, step_bytes: int, last: bool) -> bool:
    """Whether a step's KV leaves once `layer` is computed, over a link whose payloads are put.

    Such a link wants few bursts: while its wires are awake a device at its power limit computes
    more slowly, whatever crosses them. What another step follows leaves beside that one. Of a
    prompt's last step an eighth is left for its end, or a little more, and all before leaves just
    ahead.
    """
    done = layer + 1
    if not last or step_bytes < 2 * LEAST_BURST_BYTES:
        return done == num_layers
    left = max(step_bytes // 8, LEAST_BURST_BYTES)
    return done in (num_layers, num_layers - math.ceil(num_layers * left / step_bytes))


@dataclass(frozen=True)
class Ready:
    """One layer of a run of the prompt's blocks has been computed, once `fence` is reached.

    Attributes:
        first_block: index in the prompt of the first of `block_ids`.
        stamp: the blocks' generations; one object for all layers of a step.
        due: over a link this, and what came before it, leaves now.
    """

    layer: int
    first_block: int
    block_ids: tuple[int, ...]
    stamp: Stamp
    fence: Fence | None
    due: bool

    def goes_on(self, other: Ready) -> bool:
        """`other` is the next layer of the same blocks."""
        return other.layer == self.layer + 1 and other.stamp is self.stamp


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
