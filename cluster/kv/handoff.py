"""What the two sides of a handoff are told and what they report: plain values that cross the
engine's process boundaries."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.errors import HandoffRefused

Side = Literal["prefill", "decode"]


@dataclass(frozen=True)
class HandoffParams:
    """A request's part in a handoff, in vLLM's `kv_transfer_params`.

    Only a worker writes it, from a ticket it verified; nothing of it comes from a client.

    Attributes:
        ticket: the signed ticket.
        expires_in: seconds of the ticket's life left when the request was handed to the engine.
        peers: on prefill, the decode engine's transfer address per rank.
        peer_worker, peer_incarnation, peer_geometry: on prefill, the decode worker's.
    """

    side: Side
    handoff_id: str
    ticket: str
    num_tokens: int
    expires_in: float
    peers: tuple[str, ...] = ()
    peer_worker: str = ""
    peer_incarnation: str = ""
    peer_geometry: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any] | None) -> HandoffParams | None:
        """None if the request takes no part in a handoff. Raises HandoffRefused if malformed."""
        if not raw:
            return None
        try:
            return cls(**{**raw, "peers": tuple(raw.get("peers", ()))})
        except TypeError as error:
            raise HandoffRefused("handoff parameters are malformed") from error


@dataclass(frozen=True)
class HandoffResult:
    """How one side's part ended. Stamps are CLOCK_MONOTONIC seconds of the host.

    Attributes:
        error: empty if every block arrived and was verified.
        transport: how the payloads crossed.
        bytes: KV payload that crossed.
        blocks: on decode, its blocks that were to be filled.
        held_tokens: prompt tokens whose KV decode already held.
        granted_at: decode had reserved its blocks; 0 if it never did.
        first_frame_at, last_frame_at: 0 if nothing crossed.
    """

    handoff_id: str
    side: Side
    error: str
    transport: str = ""
    bytes: int = 0
    frames: int = 0
    blocks: int = 0
    held_tokens: int = 0
    granted_at: float = 0.0
    first_frame_at: float = 0.0
    last_frame_at: float = 0.0
    ended_at: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
