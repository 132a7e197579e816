"""The engine as workers see it. The real one is `cluster.engine.vllm`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from cluster.engine.blocks import HeldBlocks
from cluster.kv.handoff import HandoffParams, HandoffResult

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Guide:
    """What the output must match; exactly one is set."""

    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: tuple[str, ...] = ()
    json_object: bool = False


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one completion are drawn; vLLM's meanings and defaults."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    logit_bias: dict[int, float] = field(default_factory=dict)
    guide: Guide | None = None


@dataclass(frozen=True)
class EngineRequest:
    """One completion of one prompt.

    Attributes:
        sequence_id: unique in the cluster.
        cache_salt: prefixes are shared only between requests of one salt.
        handoff: this engine's part in a handoff, if it has one.
    """

    sequence_id: str
    prompt_token_ids: list[int]
    sampling: Sampling
    cache_salt: str = ""
    handoff: HandoffParams | None = None


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability; rank 1 is the most likely of the vocabulary.

    NaN and rank 0: not known here, of the first token behind which decode goes on.
    """

    token_id: int
    logprob: float
    rank: int
    text: str


@dataclass(frozen=True)
class TokenLogprobs:
    """At one position: the sampled token, and the most likely ones, best first."""

    sampled: Logprob
    top: tuple[Logprob, ...]


class EngineOutput(NamedTuple):
    """What one step gave a request. A tuple, because there is one for every token.

    Attributes:
        text: new text; may lag the tokens by an unfinished character or a possible stop string.
        stop: the stop string or the stop token that ended it.
        scheduled_at: CLOCK_MONOTONIC seconds at which the engine first computed for it; 0: not yet.
        cached_tokens: prompt tokens found in the prefix cache.
    """

    token_ids: list[int]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    scheduled_at: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is, once started.

    Attributes:
        transfer_addresses: host:port of each rank's transfer port.
        transport: how it can take KV: the best way that `handoff.transport` allows.
        layout: fingerprint of its KV; blocks move between engines with equal ones.
        geometry: how it cuts its KV cache into ranks and blocks.
        simulated: its tokens are made up.
        plans_ahead: it starts a step before it has looked at the one before.
        graph_tokens: steps of no more tokens are replayed from CUDA graphs; 0: none is.
    """

    transfer_addresses: tuple[str, ...]
    transport: str
    layout: str
    block_size: int
    num_blocks: int
    max_model_len: int
    vocab_size: int
    geometry: str = ""
    simulated: bool = False
    plans_ahead: bool = False
    graph_tokens: int = 0


@dataclass(frozen=True)
class PinnedKv:
    """A ledger entry of one engine rank."""

    handoff_id: str
    reason: str
    blocks: int
    bytes: int
    lease_left: float


@dataclass(frozen=True)
class Holdings:
    """What an engine holds now.

    Attributes:
        blocks_used: blocks of the pool that some request holds.
        resident_bytes: by process name.
        leaked_blocks: blocks that had to be reclaimed from handoffs since the start.
        ahead_bytes: KV of prompts computed ahead of decode's grant.
        waiting_for_credit: prompts that may not be computed before they are granted.
    """

    ledger: tuple[PinnedKv, ...]
    blocks_used: int
    blocks_total: int
    resident_bytes: dict[str, int]
    leaked_blocks: int = 0
    ahead_bytes: int = 0
    waiting_for_credit: int = 0


class Engine(Protocol):
    """One inference engine behind a worker.

    Attributes:
        held_blocks: what its prefix cache holds.
    """

    held_blocks: HeldBlocks

    async def start(self) -> EngineInfo:
        """Loads the model. Raises EngineFailed with the cause."""
        ...

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Runs a request; closing the iterator aborts it and frees its blocks.

        Raises:
            InvalidRequest: the engine cannot run such a request.
            EngineFailed: the engine has died.
        """
        ...

    def expect_handoff(self, handoff_id: str) -> None:
        """Somebody will ask how this handoff ended; call it before `generate`."""
        ...

    async def handoff_result(self, handoff_id: str) -> HandoffResult:
        """How an expected handoff ended on this engine; waits for it."""
        ...

    def forget_handoff(self, handoff_id: str) -> None:
        """Nobody will ask for its result any more."""
        ...

    async def holdings(self) -> Holdings: ...

    async def dead(self) -> str:
        """Returns, with the cause, when the engine has died."""
        ...

    async def stop(self) -> None:
        """Ends the engine and every process of it."""
        ...
