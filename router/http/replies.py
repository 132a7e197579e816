"""OpenAI's replies: chunks of a stream, and whole ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from router.output import Completed, Delta, Logprob, TokenLogprobs

DONE = b"data: [DONE]\n\n"
_LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for minus infinity, which JSON has no word for."""


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


class CompletionReply:
    """Replies of /v1/completions.

    Args:
        created: seconds since 1970.
        include_usage: the stream ends with a chunk that tells the tokens.
    """

    prefix = "cmpl-"
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, request_id: str, model: str, created: int, include_usage: bool) -> None:
        self._head = {"id": self.prefix + request_id, "created": created, "model": model}
        self._include_usage = include_usage
        self._text_offsets: dict[int, int] = {}

    def opening(self, n: int) -> bytes:
        """What a stream of n completions begins with."""
        return b""

    def chunk(self, delta: Delta) -> bytes:
        return self._chunk([self._choice(delta, self._piece(delta))])

    def closing(self, completed: Completed) -> bytes:
        if not self._include_usage:
            return DONE
        return self._chunk([], usage(completed)) + DONE

    def whole(self, deltas: Sequence[Delta], completed: Completed) -> dict[str, Any]:
        """The reply in one; `deltas` has one entry for each completion."""
        choices = [self._choice(delta, self._content(delta)) for delta in deltas]
        return {
            **self._head,
            "object": self.object,
            "choices": choices,
            "usage": usage(completed),
        }

    def _chunk(self, choices: list[dict[str, Any]], tokens: dict[str, Any] | None = None) -> bytes:
        body = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._include_usage:
            body["usage"] = tokens
        return event(body)

    def _choice(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        return {
            "index": delta.index,
            **content,
            "logprobs": self._logprobs(delta) if delta.logprobs else None,
            "finish_reason": delta.finish,
            "stop_reason": delta.stop,
        }

    def _piece(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        offsets = []
        offset = self._text_offsets.get(delta.index, 0)
        for entry in delta.logprobs:
            offsets.append(offset)
            offset += len(entry.sampled.text)
        self._text_offsets[delta.index] = offset
        return {
            "tokens": [entry.sampled.text for entry in delta.logprobs],
            "token_logprobs": [_finite(entry.sampled) for entry in delta.logprobs],
            "top_logprobs": [
                {top.text: _finite(top) for top in (entry.sampled, *entry.top)}
                for entry in delta.logprobs
            ],
            "text_offset": offsets,
        }


class ChatReply(CompletionReply):
    """Replies of /v1/chat/completions."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, n: int) -> bytes:
        role = {"role": "assistant", "content": ""}
        choices = ({"index": i, "delta": role, "finish_reason": None} for i in range(n))
        return b"".join(self._chunk([choice]) for choice in choices)

    def _piece(self, delta: Delta) -> dict[str, Any]:
        return {"delta": {"content": delta.text} if delta.text else {}}

    def _content(self, delta: Delta) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": delta.text, "refusal": None}}

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        return {"content": [_chat_logprob(entry) for entry in delta.logprobs], "refusal": None}


def usage(completed: Completed) -> dict[str, Any]:
    return {
        "prompt_tokens": completed.prompt_tokens,
        "completion_tokens": completed.completion_tokens,
        "total_tokens": completed.prompt_tokens + completed.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": completed.cached_prompt_tokens},
    }


def _chat_logprob(entry: TokenLogprobs) -> dict[str, Any]:
    return {**_chat_token(entry.sampled), "top_logprobs": [_chat_token(t) for t in entry.top]}


def _chat_token(token: Logprob) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": _finite(token),
        "bytes": list(token.text.encode(errors="replace")),
    }


def _finite(token: Logprob) -> float:
    return token.logprob if math.isfinite(token.logprob) else _LOWEST_LOGPROB
