"""What the store holds of a batch job."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cluster.store.records import known_fields

BatchState = Literal["in_progress", "cancelling", "completed", "cancelled", "expired"]
ENDED = ("completed", "cancelled", "expired")


@dataclass(frozen=True)
class BatchJob:
    """A job.

    Attributes:
        endpoint: of OpenAI's that its lines are for.
        input_file: its id; empty when the lines came with the job.
        total, completed, failed: lines; the last two have a result.
        final: what a cancelled job becomes once its lines have stopped.
        created_at, deadline_at, ended_at: seconds since 1970; 0: not yet.
        bytes: that its lines and results take of the store.
    """

    batch_id: str
    tenant: str
    endpoint: str
    state: BatchState
    total: int
    created_at: float
    deadline_at: float
    input_file: str = ""
    completed: int = 0
    failed: int = 0
    ended_at: float = 0.0
    bytes: int = 0
    final: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.tenant}/{self.batch_id}"

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def to_hash(self) -> dict[str, Any]:
        return {**asdict(self), "metadata": json.dumps(self.metadata)}

    @classmethod
    def from_hash(cls, raw: dict[str, str]) -> BatchJob:
        numbers = ("total", "completed", "failed", "bytes")
        times = ("created_at", "deadline_at", "ended_at")
        values = known_fields(cls, raw)
        values.update({name: int(raw[name]) for name in numbers})
        values.update({name: float(raw[name]) for name in times})
        return cls(**{**values, "metadata": json.loads(raw["metadata"])})


@dataclass(frozen=True)
class Page:
    """A part of a job's lines that one router works on; `lines` have no result yet."""

    number: int
    lines: tuple[int, ...]
