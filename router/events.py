"""What happens to a request, and what is to be done about it: the request machine's two sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cluster.errors import PdserveError
from router.output import (
    Completed,
    CompletionReport,
    Delta,
    FinishReason,
    Stage,
    TokenLogprobs,
    WorkerReport,
)
from router.placement import Plan, Target

# --- events -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Admitted:
    """The request may be placed."""


@dataclass(frozen=True)
class Placed:
    """Workers were found.

    Attributes:
        ticket: the signed ticket of the handoff, empty if there is none.
        base: how many tokens of the completion are part of the prompt.
        attempt: of the Place that this answers; None: the latest.
    """

    plan: Plan
    sequence_id: str
    ticket: bytes
    base: int = 0
    attempt: int | None = None


@dataclass(frozen=True)
class Started:
    """The placed sequence was handed to its workers' links."""


class Output(NamedTuple):
    """New tokens of a sequence from the worker that does `stage` of it.

    A tuple, as `Delta` is, because there is one for every token: it is made in a quarter of the
    time that a frozen dataclass takes.

    Attributes:
        offset: position of the first of `token_ids` in the completion.
        finish: set on the last output of that worker.
        report: on the last output.
    """

    sequence_id: str
    stage: Stage
    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None
    report: WorkerReport | None = None


@dataclass(frozen=True)
class WorkerFailed:
    """The worker that does `stage` of the sequence gave it up, or was lost."""

    sequence_id: str
    stage: Stage
    error: PdserveError


@dataclass(frozen=True)
class Cancel:
    """The client is gone or called Cancel."""


@dataclass(frozen=True)
class Deadline:
    """The client's deadline has passed."""


@dataclass(frozen=True)
class GiveWay:
    """Its room is needed: it stops, and waits to be admitted again."""


@dataclass(frozen=True)
class Abort:
    """The router gives the request up."""

    error: PdserveError


Event = Admitted | Placed | Started | Output | WorkerFailed | Cancel | Deadline | GiveWay | Abort

# --- effects ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Find workers for a completion, not before `delay_seconds` are over; retries avoid some.

    Attributes:
        prefix: tokens of the completion that were sent: they are computed as part of the prompt.
    """

    index: int
    attempt: int
    avoid: frozenset[str] = frozenset()
    delay_seconds: float = 0.0
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True)
class StartSequence:
    """Hand a sequence to a worker."""

    index: int
    worker: Target
    stage: Stage
    sequence_id: str
    ticket: bytes


@dataclass(frozen=True)
class CancelSequence:
    """Tell a worker to drop a sequence."""

    worker: Target
    sequence_id: str


@dataclass(frozen=True)
class Emit:
    """Send tokens to the client."""

    delta: Delta


@dataclass(frozen=True)
class PromptComputed:
    """The first tokens of all completions are there: prefill has done its part."""


@dataclass(frozen=True)
class Finish:
    """A completion has ended well. The request machine keeps it until all have."""

    report: CompletionReport


@dataclass(frozen=True)
class Complete:
    """The request has ended well: its one terminal effect, or else Fail."""

    completed: Completed


@dataclass(frozen=True)
class Fail:
    """The request has ended with an error."""

    error: PdserveError


Effect = Place | StartSequence | CancelSequence | Emit | PromptComputed | Finish | Complete | Fail
