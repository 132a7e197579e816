"""A sequence on a worker: one stage of one completion, and what the worker says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from cluster.engine.protocol import FinishReason, Sampling, TokenLogprobs
from cluster.errors import PdserveError
from cluster.kv.handoff import HandoffResult

Stage = Literal["prefill", "decode", "whole"]


@dataclass(frozen=True)
class SequenceStart:
    """A router's order.

    Attributes:
        ticket: the signed ticket; empty when nothing is handed off.
    """

    sequence_id: str
    stage: Stage
    prompt_token_ids: list[int]
    sampling: Sampling
    ticket: bytes
    cache_salt: str


@dataclass(frozen=True)
class SequenceReport:
    """A worker's stamps of a sequence: CLOCK_MONOTONIC seconds of its host; 0: did not happen.

    Attributes:
        landed_at: every block had landed and was verified.
        first_token_at: the first token came out; on decode, with the second.
        second_token_at: the first token that decode sampled itself.
    """

    accepted_at: float
    landed_at: float = 0.0
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    second_token_at: float = 0.0
    cached_tokens: int = 0
    handoff: HandoffResult | None = None


class SequenceStep(NamedTuple):
    """New tokens of a sequence; with finish_reason, its last step. A tuple, as EngineOutput is."""

    sequence_id: str
    offset: int
    token_ids: list[int]
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    error: PdserveError | None = None
    report: SequenceReport | None = None


def joined(steps: Sequence[SequenceStep]) -> SequenceStep:
    """Steps that follow each other in a sequence, as one."""
    return steps[-1]._replace(
        offset=steps[0].offset,
        token_ids=[token for step in steps for token in step.token_ids],
        text="".join(step.text for step in steps),
        logprobs=tuple(entry for step in steps for entry in step.logprobs),
    )


Emit = Callable[[SequenceStep], None]


class Face(Protocol):
    """How a worker serves one stage: a prefill worker's or a decode worker's face."""

    async def run(self, start: SequenceStart, emit: Emit) -> None:
        """Runs the sequence to its last step; when cancelled, frees what it holds.

        Raises:
            PdserveError: it cannot be served; the caller reports it.
        """
        ...


@dataclass(frozen=True)
class Identity:
    """Whose tickets a worker may act on."""

    worker_id: str
    incarnation: str
    layout: str
