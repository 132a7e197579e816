"""What comes back: tokens, how each completion was served, and where its time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a completion ended; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


class Stage(StrEnum):
    """What a worker does of a sequence."""

    PREFILL = "prefill"
    DECODE = "decode"
    WHOLE = "whole"


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability; rank 1 is the most likely of the vocabulary."""

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probabilities at one output position; `top` is most likely first."""

    sampled: Logprob
    top: tuple[Logprob, ...] = ()

    @property
    def known(self) -> bool:
        """Not so for the first token as decode repeats it: prefill sampled it, and tells them."""
        return not math.isnan(self.sampled.logprob)


class Delta(NamedTuple):
    """New tokens of one completion.

    Attributes:
        index: which of the n completions.
        offset: position of the first of `token_ids` in the completion.
        text: may lag the tokens.
        logprobs: as many as token_ids, or none.
        finish: set on the completion's last delta.
        stop: the stop string or token id that ended it.
        text_offset: characters of the completion's text before `text`.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs of it
    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None
    text_offset: int = 0


@dataclass(frozen=True)
class Phases:
    """Where a completion's time went, in seconds; they add up to its end-to-end time."""

    queue: float = 0.0
    prefill_queue: float = 0.0
    prefill: float = 0.0
    handoff_wait: float = 0.0
    decode_queue: float = 0.0
    first_step: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Handoff:
    """One KV handoff, as the decode worker saw it."""

    transport: str
    bytes: int
    messages: int
    held_tokens: int
    blocks: int
    transfer_seconds: float
    elapsed_seconds: float


@dataclass(frozen=True)
class WorkerReport:
    """A worker's own stamps of a sequence: seconds before its last message, None if never."""

    accepted_ago: float | None = None
    landed_ago: float | None = None
    scheduled_ago: float | None = None
    first_token_ago: float | None = None
    second_token_ago: float | None = None
    cached_prompt_tokens: int = 0
    handoff: Handoff | None = None


@dataclass(frozen=True)
class CompletionReport:
    """How one completion was served.

    Attributes:
        decode_worker: empty when it ended with its first token.
        ttft_seconds: received to first token.
        tpot_seconds: mean gap between the tokens after the first; 0 with one token.
        publish_seconds: received to what a user sees first; None where that was not marked.
    """

    index: int
    tokens: int
    prefill_worker: str
    decode_worker: str
    phases: Phases
    handoff: Handoff | None
    cached_prompt_tokens: int
    ttft_seconds: float
    tpot_seconds: float
    publish_seconds: float | None = None


@dataclass(frozen=True)
class Completed:
    """The end of a request that succeeded: usage, and one report per completion by index."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    completions: tuple[CompletionReport, ...]


def joined(deltas: Sequence[Delta]) -> Delta:
    """All deltas of a completion, in order, as one."""
    last = deltas[-1]
    return last._replace(
        offset=deltas[0].offset,
        text_offset=deltas[0].text_offset,
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        text="".join(delta.text for delta in deltas),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
    )
