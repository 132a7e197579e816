"""One request's stamps, and what follows from them. All are CLOCK_MONOTONIC seconds of one host."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from cluster.kv.handoff import HandoffResult


@dataclass(frozen=True)
class Crossing:
    """A handoff by both sides' reports.

    Attributes:
        prefill: None if prefill gave no report in time.
        first_token_at: the first token was there.
    """

    decode: HandoffResult
    prefill: HandoffResult | None
    first_token_at: float

    @property
    def bytes(self) -> int:
        return self.decode.bytes

    @property
    def began(self) -> float:
        """From when bytes could cross: both sides knew of the grant."""
        granted = self.prefill.granted_at if self.prefill else 0.0
        return max(self.decode.granted_at, granted)

    @property
    def seconds(self) -> float:
        """Grant to the last byte landed and verified."""
        return max(self.decode.last_frame_at - self.began, 1e-9)

    @property
    def gib_per_second(self) -> float:
        return self.bytes / self.seconds / (1 << 30)

    @property
    def exposed(self) -> float:
        """What the client waits for: first token to the handoff's end on decode."""
        return max(0.0, self.decode.ended_at - self.first_token_at)

    @property
    def overlap(self) -> float:
        """Share of the time from grant to end that passed before the first token."""
        whole = max(self.decode.ended_at - self.began, 1e-9)
        return 1.0 - min(1.0, self.exposed / whole)


@dataclass(frozen=True)
class Request:
    """A request as its client saw it.

    Attributes:
        began: just before the engines were told.
        stamps: when each token was there.
        cached: prompt tokens found in a prefix cache.
        gaps: see `wire.Generated`.
    """

    began: float
    tokens: tuple[int, ...]
    stamps: tuple[float, ...]
    cached: int = 0
    gaps: tuple[float, ...] = ()
    crossing: Crossing | None = None

    @property
    def ttft(self) -> float:
        return self.stamps[0] - self.began

    @property
    def second(self) -> float | None:
        """First token to second; None for one token."""
        return self.stamps[1] - self.stamps[0] if len(self.stamps) > 1 else None

    @property
    def step(self) -> float | None:
        """Median gap after the second token; None below three tokens."""
        later = [after - before for before, after in pairwise(self.stamps[1:])]
        return median(later) if later else None
