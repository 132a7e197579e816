"""Tokens that follow from all tokens before them, as a model's do: whoever knows the prompt knows
the answer, also from the middle of it, and a lost or repeated token shows in all that follow."""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Sequence

from cluster.engine.protocol import Sampling
from cluster.errors import InvalidRequest

FIRST_TOKEN = 8
"""Lower ones are taken to be special."""


class TokenSource:
    """The continuation of one prompt.

    Args:
        seed: of the engine and the request together.
        vocab_size: tokens are drawn from FIRST_TOKEN up to it.
    """

    def __init__(self, prompt: Sequence[int], seed: int, vocab_size: int) -> None:
        self._state = zlib.crc32(array("I", prompt).tobytes(), seed & 0xFFFFFFFF)
        self._span = vocab_size - FIRST_TOKEN

    def draw(self) -> int:
        """The next token."""
        mixed = (self._state * 0x9E3779B1) & 0xFFFFFFFF
        token = FIRST_TOKEN + (mixed >> 7) % self._span
        self._state = zlib.crc32(struct.pack("<I", token), self._state)
        return token


def continuation(prompt: Sequence[int], count: int, seed: int, vocab_size: int) -> list[int]:
    """The answer that a simulated engine gives."""
    source = TokenSource(prompt, seed, vocab_size)
    return [source.draw() for _ in range(count)]


def text_of(token: int) -> str:
    return f" {token:x}"


def refuse_unsimulated(sampling: Sampling) -> None:
    """Raises InvalidRequest for what depends on a network's logits, or on text."""
    for name in ("logprobs", "guide", "stop", "logit_bias"):
        if getattr(sampling, name) not in (None, (), {}):
            raise InvalidRequest(f"sampling.{name}", "a simulated engine has no such thing")
