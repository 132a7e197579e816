"""What a caller asks for: plain values, the same whether they came over gRPC or HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cluster.ids import RequestId


@dataclass(frozen=True)
class Guide:
    """What guided decoding must match.

    Attributes:
        kind: which of the protocol's guides.
        text: the schema (as JSON), the regular expression or the grammar; else empty.
        choices: with kind `choice`.
    """

    kind: Literal["json_schema", "regex", "grammar", "choice", "json_object"]
    text: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. None takes vLLM's default; limits are in `router.validate`."""

    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    guide: Guide | None = None

    @property
    def replayable(self) -> bool:
        """Running it again on the same prompt gives the same tokens."""
        # vLLM draws at any temperature above 0, and takes a seed of -1 as none.
        return self.temperature == 0 or (self.seed is not None and self.seed != -1)

    def completion(self, index: int) -> Sampling:
        """The sampling of completion `index` of n: alone, with its own seed, as vLLM splits it."""
        seed = None if self.seed is None else self.seed + index
        return replace(self, n=1, seed=seed)


@dataclass(frozen=True)
class ChatMessage:
    """One turn, as the model's chat template takes it."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """Exactly one of the three is set."""

    text: str | None = None
    chat: tuple[ChatMessage, ...] | None = None
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ask:
    """A request as it came, not yet checked.

    Attributes:
        timeout_seconds: what is left of the caller's deadline; None: it set none.
        default_max_tokens: taken, as far as the context allows, when max_tokens is unset.
        received_at: seconds of the router's clock.
    """

    model: str
    prompt: Prompt
    sampling: Sampling
    received_at: float
    timeout_seconds: float | None
    request_id: str = ""
    cache_salt: str = ""
    default_max_tokens: int | None = None


@dataclass(frozen=True)
class Generation:
    """A request that passed every check.

    Attributes:
        sampling: with max_tokens set.
        received_at, deadline: seconds of the router's clock.
    """

    request_id: RequestId
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str
    received_at: float
    deadline: float

    @property
    def max_tokens(self) -> int:
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens
