"""Text to token ids: the one place where it happens, in the way vLLM does it.

Plain text gets the model's special tokens; a chat is rendered by the model's template, which
writes them itself, so it gets none on top.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.config import ModelConfig
from cluster.errors import ConfigError, InvalidRequest
from router.generation import ChatMessage, Prompt

INLINE_CHARS = 50_000
"""Longer texts are encoded in a thread, so that they do not hold up other requests' tokens."""

MAX_CHAR_TOKENS = 4
"""UTF-8 has characters of four bytes."""

_SAMPLE = " Grüße,\n\tworld  42 <s></s><|endoftext|>\U0001f30d "

MESSAGE_CHARS = 16
"""What a chat template is taken to write around a message."""


class Tokenizer:
    """One model's tokenizer.

    Args:
        pretrained: a transformers tokenizer; `load` reads it from the model's directory.
        limits: (context length, vocabulary size) that the model's own configuration gives, 0 where
            it does not.
    """

    def __init__(self, pretrained: Any, limits: tuple[int, int] = (0, 0)) -> None:
        self._pretrained = pretrained
        self._fast = _backend(pretrained)
        self.max_model_len, vocab_size = limits
        self.vocab_size = vocab_size or len(pretrained)
        # One thread: the tokenizer itself is not safe to share.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._thread_users = 0

    @classmethod
    def load(cls, model: ModelConfig) -> Tokenizer:
        """Reads the tokenizer; blocks for a second or more.

        Raises:
            ConfigError: it cannot be read.
        """
        from transformers import AutoConfig, AutoTokenizer

        where: dict[str, Any] = {
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
        }
        try:
            pretrained = AutoTokenizer.from_pretrained(model.path, **where)
            shape = AutoConfig.from_pretrained(model.path, **where).get_text_config()
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"models.{model.name}.path: no tokenizer and configuration can be read from "
                f"{model.path}; give a directory or a hub name that has them"
            ) from error
        context = int(getattr(shape, "max_position_embeddings", 0) or 0)
        return cls(pretrained, (context, int(getattr(shape, "vocab_size", 0) or 0)))

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids.

        Raises:
            InvalidRequest: the model has no chat template, or its template refuses the chat.
        """
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.chat is not None:
            chars = sum(len(m.role) + len(m.content) + MESSAGE_CHARS for m in prompt.chat)
            return await self._run(chars, self._encode_chat, prompt.chat)
        text = prompt.text or ""
        return await self._run(len(text), self._encode_text, text)

    def settled(self, token_ids: Sequence[int]) -> bool:
        """They end with a whole character: a token is one byte of it at least."""
        tail = self._pretrained.decode(list(token_ids[-MAX_CHAR_TOKENS:]))
        return not tail.endswith("\ufffd")

    def close(self) -> None:
        """Ends the thread; texts in it are given up."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, chars: int, encode: Any, content: Any) -> tuple[int, ...]:
        if chars <= INLINE_CHARS and not self._thread_users:
            return tuple(encode(content))
        with self._in_thread():
            loop = asyncio.get_running_loop()
            return tuple(await loop.run_in_executor(self._thread, encode, content))

    @contextlib.contextmanager
    def _in_thread(self) -> Iterator[None]:
        self._thread_users += 1
        try:
            yield
        finally:
            self._thread_users -= 1

    def _encode_text(self, text: str) -> Sequence[int]:
        return self._ids(text, add_special_tokens=True)

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> Sequence[int]:
        if not getattr(self._pretrained, "chat_template", None):
            raise InvalidRequest("chat", "the model has no chat template; send a text prompt")
        turns = [{"role": m.role, "content": m.content} for m in messages]
        import jinja2

        try:
            rendered = self._pretrained.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            # A template's own message is written for its user ("roles must alternate").
            raise InvalidRequest(
                "chat.messages", f"the model's chat template refuses them: {str(error)[:200]}"
            ) from error
        return self._ids(rendered, add_special_tokens=False)

    def _ids(self, text: str, add_special_tokens: bool) -> Sequence[int]:
        if self._fast is None:
            ids = self._pretrained.encode(text, add_special_tokens=add_special_tokens)
        else:
            ids = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids  # type: ignore[no-any-return]


def _backend(pretrained: Any) -> Any:
    """What does a tokenizer's work, without what transformers does around one text; None if that
    would not come to the same."""
    backend = getattr(pretrained, "backend_tokenizer", None)
    if backend is None:
        return None
    for special in (True, False):  # The first call also sets the backend's truncation and padding.
        ids = pretrained.encode(_SAMPLE, add_special_tokens=special)
        if ids != backend.encode(_SAMPLE, add_special_tokens=special).ids:
            return None
    return backend
