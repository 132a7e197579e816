"""What a push is told, and what it tells: plain values."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.kv.generations import Stamp
from cluster.kv.geometry import Route
from cluster.kv.milestones import Fence
from cluster.kv.transport.seam import Peer


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
