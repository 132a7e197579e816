"""What a handoff between two agents took: plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinkRate:
    """Medians of a size.

    Attributes:
        transport: that it went over.
        whole_ms: from the prompt's arrival at prefill to decode's verdict.
        moving_ms: from the grant to the last byte landed.
        cpu_ms: of both processes.
    """

    transport: str
    mib: int
    whole_ms: float
    moving_ms: float
    cpu_ms: float

    @property
    def gib_per_s(self) -> float:
        return self.mib / 1024 / self.moving_ms * 1000
