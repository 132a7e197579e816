"""Every limit on a request. Pure; each refusal names the field, the limit and the value.

Fields are named as in pdserve.v1 (`sampling.top_p`); the HTTP side renames them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.errors import DeadlineExceeded, InvalidRequest, NotFound
from cluster.ids import REQUEST_ID_PATTERN, RequestId
from router.generation import ChatMessage, Guide, Sampling

MAX_N = 16
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_CACHE_SALT_CHARS = 256
MAX_IDEMPOTENCY_KEY_CHARS = 256
MAX_GUIDE_CHARS = 64 << 10
MAX_CHOICES = 1024
MAX_MESSAGES = 4096
MAX_ROLE_CHARS = 64
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


class RequestIdTaken(InvalidRequest):
    """Another request of the caller's that runs, or is kept, has the id."""

    def __init__(self, request_id: str, which: str) -> None:
        super().__init__("request_id", f"{request_id} is the id of a request that is {which}")


@dataclass(frozen=True)
class ModelLimits:
    """What a model can take.

    Attributes:
        max_model_len: prompt and output tokens together.
        vocab_size: token ids are below it.
    """

    name: str
    max_model_len: int
    vocab_size: int


def check_model(name: str, known: Sequence[str]) -> str:
    """The model meant by `name`; empty means the only one there is.

    Raises:
        InvalidRequest: it is empty and there are several.
        NotFound: there is no such model.
    """
    if not name:
        if len(known) == 1:
            return known[0]
        raise InvalidRequest("model", f"is required; this cluster serves {', '.join(known)}")
    if name not in known:
        shown = name if len(name) <= 100 else name[:100] + "…"
        raise NotFound(f"model: there is no {shown!r}; this cluster serves {', '.join(known)}")
    return name


def check_request_id(request_id: str) -> RequestId:
    """Raises InvalidRequest unless it is 1 to 128 characters of [A-Za-z0-9._:-]."""
    if not REQUEST_ID_PATTERN.fullmatch(request_id):
        raise InvalidRequest("request_id", "must be 1 to 128 characters of [A-Za-z0-9._:-]")
    return RequestId(request_id)


def check_cache_salt(salt: str) -> None:
    """Raises InvalidRequest if it is too long."""
    if len(salt) > MAX_CACHE_SALT_CHARS:
        raise InvalidRequest(
            "cache_salt", f"must be at most {MAX_CACHE_SALT_CHARS} characters, not {len(salt)}"
        )


def check_idempotency_key(key: str) -> None:
    """Raises InvalidRequest if it is too long or not printable."""
    if len(key) > MAX_IDEMPOTENCY_KEY_CHARS:
        raise InvalidRequest(
            "idempotency_key",
            f"must be at most {MAX_IDEMPOTENCY_KEY_CHARS} characters, not {len(key)}",
        )
    if not key.isprintable():
        raise InvalidRequest("idempotency_key", "must be printable characters")


def check_publish_after(mark: str | int | None) -> None:
    """Raises InvalidRequest if it is an empty or a long text."""
    if isinstance(mark, str) and not 0 < len(mark) <= MAX_STOP_CHARS:
        raise InvalidRequest(
            "publish_after_text", f"must be 1 to {MAX_STOP_CHARS} characters, not {len(mark)}"
        )


def check_timeout(seconds: float | None) -> float:
    """What is left of the deadline, in seconds.

    Raises:
        InvalidRequest: there is none, or it is no time.
        DeadlineExceeded: it has passed.
    """
    if seconds is None:
        raise InvalidRequest("deadline", "is required: set a timeout on the call")
    if not math.isfinite(seconds):
        raise InvalidRequest("deadline", "must be a finite number of seconds")
    if seconds <= 0:
        raise DeadlineExceeded("the deadline had passed when the request came in")
    return seconds


def check_chat(messages: Sequence[ChatMessage]) -> None:
    """Raises InvalidRequest if there is no message or too many, or one without a fit role."""
    if not messages:
        raise InvalidRequest("chat.messages", "must have at least one message")
    check_message_count(len(messages))
    for i, message in enumerate(messages):
        if not message.role:
            raise InvalidRequest(f"chat.messages[{i}].role", "is required")
        if len(message.role) > MAX_ROLE_CHARS:
            raise InvalidRequest(
                f"chat.messages[{i}].role", f"must have at most {MAX_ROLE_CHARS} characters"
            )


def check_message_count(count: int) -> None:
    """Raises InvalidRequest if a chat has too many messages; for before they are looked at."""
    if count > MAX_MESSAGES:
        raise InvalidRequest(
            "chat.messages", f"must have at most {MAX_MESSAGES} messages, not {count}"
        )


def check_prompt(token_ids: Sequence[int], limits: ModelLimits, field: str) -> None:
    """Raises InvalidRequest if the prompt is empty, too long or outside the vocabulary."""
    if not token_ids:
        raise InvalidRequest(field, "must have at least one token")
    longest = limits.max_model_len - 1
    if len(token_ids) > longest:
        raise InvalidRequest(
            field,
            f"has {len(token_ids)} tokens; {limits.name} takes at most {longest} "
            f"(its context of {limits.max_model_len} less one to generate)",
        )
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= limits.vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(
            field, f"token id {bad} is outside the vocabulary of {limits.vocab_size}"
        )


def resolve_max_tokens(
    sampling: Sampling, prompt_tokens: int, limits: ModelLimits, default: int | None = None
) -> Sampling:
    """`sampling` with max_tokens set: as asked, or what is left of the context, at most `default`.

    Raises:
        InvalidRequest: prompt and output do not fit into the context together, or min_tokens is
            above max_tokens.
    """
    rest = limits.max_model_len - prompt_tokens
    asked = sampling.max_tokens
    if asked is None:
        asked = rest if default is None else min(rest, default)
    elif asked > rest:
        raise InvalidRequest(
            "sampling.max_tokens",
            f"{asked} and the prompt's {prompt_tokens} tokens exceed the context of "
            f"{limits.max_model_len} tokens; at most {rest} are left",
        )
    if sampling.min_tokens > asked:
        raise InvalidRequest(
            "sampling.min_tokens",
            f"must be at most max_tokens, which is {asked}, not {sampling.min_tokens}",
        )
    return sampling if asked == sampling.max_tokens else replace(sampling, max_tokens=asked)


def check_sampling(sampling: Sampling, limits: ModelLimits) -> None:
    """Raises InvalidRequest for the first value out of its limits."""
    s = sampling
    _integer("max_tokens", s.max_tokens, 1, None)
    _integer("min_tokens", s.min_tokens, 0, None)
    _integer("n", s.n, 1, MAX_N)
    _number("temperature", s.temperature, 0, 2)
    _number("top_p", s.top_p, 0, 1, above=True)
    _integer("top_k", s.top_k, 0, limits.vocab_size)
    _number("min_p", s.min_p, 0, 1)
    _integer("seed", s.seed, INT64_MIN, INT64_MAX - MAX_N)
    _number("presence_penalty", s.presence_penalty, -2, 2)
    _number("frequency_penalty", s.frequency_penalty, -2, 2)
    _number("repetition_penalty", s.repetition_penalty, 0, 10, above=True)
    _integer("logprobs", s.logprobs, 0, MAX_LOGPROBS)
    _stops(s, limits)
    _at_most("logit_bias", len(s.logit_bias), MAX_LOGIT_BIAS, "entries")
    for token_id, bias in s.logit_bias:
        _token("logit_bias", token_id, limits)
        _number(f"logit_bias[{token_id}]", bias, -100, 100)
    if s.guide is not None:
        _guide(s.guide)


def _stops(s: Sampling, limits: ModelLimits) -> None:
    _at_most("stop", len(s.stop), MAX_STOP_STRINGS, "strings")
    for i, stop in enumerate(s.stop):
        if not stop:
            raise InvalidRequest(f"sampling.stop[{i}]", "must not be empty")
        _at_most(f"stop[{i}]", len(stop), MAX_STOP_CHARS, "characters")
    _at_most("stop_token_ids", len(s.stop_token_ids), MAX_STOP_TOKEN_IDS, "ids")
    for token_id in s.stop_token_ids:
        _token("stop_token_ids", token_id, limits)


def _guide(guide: Guide) -> None:
    name = f"guide.{guide.kind}"
    if guide.kind == "choice":
        if not guide.choices or not all(guide.choices):
            raise InvalidRequest(f"sampling.{name}", "must list strings that are not empty")
        _at_most(name, len(guide.choices), MAX_CHOICES, "choices")
        _at_most(name, sum(map(len, guide.choices)), MAX_GUIDE_CHARS, "characters")
        return
    _at_most(name, len(guide.text), MAX_GUIDE_CHARS, "characters")
    if guide.kind != "json_object" and not guide.text:
        raise InvalidRequest(f"sampling.{name}", "must not be empty")
    if guide.kind == "json_schema":
        try:
            schema = json.loads(guide.text)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"sampling.{name}", "is not JSON") from None
        if not isinstance(schema, dict | bool):
            raise InvalidRequest(f"sampling.{name}", "must be a JSON object")


def _integer(name: str, value: int | None, low: int, high: int | None) -> None:
    if value is None or (value >= low and (high is None or value <= high)):
        return
    limit = f"at least {low}" if high is None else f"from {low} to {high}"
    raise InvalidRequest(f"sampling.{name}", f"must be {limit}, not {value}")


def _number(name: str, value: float | None, low: float, high: float, above: bool = False) -> None:
    if value is None:
        return
    if math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    limit = f"above {low} and at most {high}" if above else f"from {low} to {high}"
    raise InvalidRequest(f"sampling.{name}", f"must be {limit}, not {value:g}")


def _at_most(name: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise InvalidRequest(f"sampling.{name}", f"must be at most {limit} {what}, not {count}")


def _token(name: str, token_id: int, limits: ModelLimits) -> None:
    if not 0 <= token_id < limits.vocab_size:
        raise InvalidRequest(
            f"sampling.{name}",
            f"token id {token_id} is outside the vocabulary of {limits.vocab_size}",
        )
