"""The bodies of OpenAI's requests: what is accepted of them, and what they ask for."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import InvalidRequest
from router.generation import Ask, ChatMessage, Guide, Prompt, Sampling

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, of /v1/completions."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    """What a stream carries besides tokens."""

    include_usage: bool = False


class JsonSchema(_Body):
    """The json_schema of a response_format."""

    name: str = ""
    description: str | None = None
    schema_: Any = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """Free text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Body):
    """vLLM's own form of guides; one of the fields."""

    json_: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class _Generate(_Body, ABC):
    """What both endpoints take; the fields behind `user` are vLLM's.

    Fields of type None are OpenAI's and not supported; a client may say that it leaves them out.
    """

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int = 0
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    request_id: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def asked(self, received_at: float, timeout_seconds: float, request_id: str) -> Ask:
        """What the body asks for.

        Raises:
            InvalidRequest: fields contradict each other, or ask for what is not done.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "needs stream to be true")
        return Ask(
            model=self.model,
            prompt=self._prompt(),
            sampling=self._sampling(),
            received_at=received_at,
            timeout_seconds=timeout_seconds,
            request_id=self.request_id or request_id,
            cache_salt=self.cache_salt or "",
            default_max_tokens=self._default_max_tokens(),
        )

    @abstractmethod
    def _prompt(self) -> Prompt: ...

    @abstractmethod
    def _logprobs(self) -> int | None: ...

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def _default_max_tokens(self) -> int | None:
        return None

    def _sampling(self) -> Sampling:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self._max_tokens(),
            min_tokens=self.min_tokens,
            n=1 if self.n is None else self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            # -1 is vLLM's older way to say all tokens.
            top_k=None if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            logprobs=self._logprobs(),
            skip_special_tokens=self.skip_special_tokens,
            logit_bias=tuple(_biases(self.logit_bias or {})),
            guide=self._guide(),
        )

    def _guide(self) -> Guide | None:
        wanted = self.response_format
        if self.structured_outputs is not None:
            if wanted is not None and wanted.type != "text":
                raise InvalidRequest("structured_outputs", "excludes response_format")
            return _structured(self.structured_outputs)
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return Guide("json_object")
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise InvalidRequest("response_format.json_schema", "needs a schema")
        return Guide("json_schema", json.dumps(wanted.json_schema.schema_))


class CompletionBody(_Generate):
    """POST /v1/completions."""

    suffix: None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def _prompt(self) -> Prompt:
        if self.echo:
            raise InvalidRequest("echo", "is not supported; prepend the prompt yourself")
        if self.best_of not in (None, 1):
            raise InvalidRequest("best_of", "is not supported; use n")
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise InvalidRequest("prompt", f"must be one prompt, not {len(prompt)}")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return Prompt(text=prompt)
        return Prompt(token_ids=tuple(t for t in prompt if isinstance(t, int)))

    def _logprobs(self) -> int | None:
        return self.logprobs

    def _default_max_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a chat."""

    role: str
    content: str | list[TextPart]
    name: None = None
    # What an answer carries, so that it can be sent back as it is for the next turn.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The content; parts are joined by newlines, as vLLM does."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatBody(_Generate):
    """POST /v1/chat/completions."""

    messages: list[Message]
    tools: None = None
    tool_choice: None = None
    parallel_tool_calls: None = None
    functions: None = None
    function_call: None = None
    metadata: None = None
    store: None = None
    service_tier: None = None
    reasoning_effort: None = None
    audio: None = None
    modalities: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_key: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    safety_identifier: None = None
    verbosity: None = None
    web_search_options: None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def _prompt(self) -> Prompt:
        return Prompt(chat=tuple(ChatMessage(m.role, m.text) for m in self.messages))

    def _max_tokens(self) -> int | None:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidRequest("max_tokens", "differs from max_completion_tokens")
        return next(iter(both), None)

    def _logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs", "needs logprobs to be true")
        return (self.top_logprobs or 0) if self.logprobs else None


def _biases(entries: dict[str, float]) -> list[tuple[int, float]]:
    biases = []
    for key, bias in entries.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise InvalidRequest("logit_bias", f"{key[:20]!r} is not a token id")
        biases.append((int(key), bias))
    return biases


def _structured(wanted: StructuredOutputs) -> Guide:
    given = [name for name, value in wanted if value is not None]
    if len(given) != 1:
        raise InvalidRequest("structured_outputs", "must have exactly one of its fields")
    if wanted.json_ is not None:
        schema = wanted.json_
        return Guide("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
    if wanted.regex is not None:
        return Guide("regex", wanted.regex)
    if wanted.grammar is not None:
        return Guide("grammar", wanted.grammar)
    if wanted.choice is not None:
        return Guide("choice", choices=tuple(wanted.choice))
    return Guide("json_object")
