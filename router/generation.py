"""What a caller asks for: plain values, the same whether they came over gRPC or HTTP."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from cluster.ids import RequestId
from router.admission.offers import SloClass

DEFAULT_TENANT = "default"
"""Everyone, where no tenants are configured."""


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
        if self.n == 1 and not index:
            return self
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
class Urgency:
    """What a caller says of how urgent its request is; None: as its class has it.

    Attributes:
        slo_class: None: by its deadline.
        priority: among the caller's own, higher goes first.
        ttft_seconds, tpot_seconds: its targets.
    """

    slo_class: SloClass | None = None
    priority: int = 0
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None


@dataclass(frozen=True)
class Slo:
    """A request's class and targets; infinite where it has none."""

    slo_class: SloClass = SloClass.STANDARD
    priority: int = 0
    ttft_seconds: float = math.inf
    tpot_seconds: float = math.inf


@dataclass(frozen=True)
class Ask:
    """A request as it came, not yet checked.

    Attributes:
        timeout_seconds: what is left of the caller's deadline; None: it set none.
        default_max_tokens: taken, as far as the context allows, when max_tokens is unset.
        received_at: seconds of the router's clock.
        suggested_id: a fit id to go by where `request_id` is empty and no other request has it.
        idempotency_key: a repetition under it joins or replays the first request.
        resumable: it can be resumed; implied by a key.
        publish_after: text or token id behind which the answer begins that a user sees.
    """

    model: str
    prompt: Prompt
    sampling: Sampling
    received_at: float
    timeout_seconds: float | None
    request_id: str = ""
    suggested_id: str = ""
    cache_salt: str = ""
    default_max_tokens: int | None = None
    urgency: Urgency = Urgency()
    idempotency_key: str = ""
    resumable: bool = False
    publish_after: str | int | None = None


@dataclass(frozen=True)
class Generation:
    """A request that passed every check.

    Attributes:
        sampling: with max_tokens set.
        cache_salt: the caller's own, under its tenant's.
        received_at, deadline: seconds of the router's clock.
    """

    request_id: RequestId
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    cache_salt: str
    received_at: float
    deadline: float
    tenant: str = DEFAULT_TENANT
    slo: Slo = Slo()
    publish_after: str | int | None = None

    @property
    def max_tokens(self) -> int:
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens

    def going_on(self, prefix: tuple[int, ...]) -> Generation:
        """The same, with tokens of its one completion that are there already in the prompt."""
        if not prefix:
            return self
        sampling = replace(
            self.sampling,
            max_tokens=self.max_tokens - len(prefix),
            min_tokens=max(0, self.sampling.min_tokens - len(prefix)),
        )
        prompt = self.prompt_token_ids + prefix
        return replace(self, prompt_token_ids=prompt, sampling=sampling)
