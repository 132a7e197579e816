"""What of one completion the client has: offsets never skip or repeat, nothing is contradicted.

Prefill and decode both send the first token, and a retry sends it again. A client gets it once,
with each character of its text once; that the repetitions agree is checked.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import PdserveError
from router.events import Output
from router.output import Delta, FinishReason

_HEAD_CHARS = 1024


class Contradiction(PdserveError):
    """A worker's output does not continue what the client already has. Reaches it as INTERNAL."""


@dataclass(slots=True)
class Source:
    """How far one worker's output of a sequence has come."""

    tokens: int = 0
    chars: int = 0


class SentTokens:
    """The tokens and the text that were sent of one completion."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._tokens = array("I")
        self._head = ""
        self.chars = 0
        self.finished = False
        """Another router has sent all of it."""

    @property
    def count(self) -> int:
        return len(self._tokens)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._tokens)

    def take(
        self, output: Output, source: Source, finish: FinishReason | None = None
    ) -> Delta | None:
        """What of `output` is new to the client, from now on counted as sent; None if nothing is.

        Args:
            source: of the worker that it came from; moves on.
            finish: the completion ends with it.

        Raises:
            Contradiction: it skips tokens, or differs from what was sent.
        """
        if output.offset != source.tokens:
            raise Contradiction(f"output at offset {output.offset} where {source.tokens} was due")
        if output.logprobs and len(output.logprobs) != len(output.token_ids):
            raise Contradiction("output with other than one logprob entry a token")
        repeated = min(max(0, self.count - output.offset), len(output.token_ids))
        known = self._tokens[output.offset : output.offset + repeated]
        if repeated and known != array("I", output.token_ids[:repeated]):
            raise Contradiction(f"other tokens than were sent from offset {output.offset}")
        logprobs = output.logprobs[repeated:]
        if logprobs and not logprobs[0].known:
            raise Contradiction("a token without its logprobs, which another worker was to tell")
        text = self._new_text(output.text, source.chars)
        source.tokens += len(output.token_ids)
        source.chars += len(output.text)
        token_ids = output.token_ids[repeated:]
        if not token_ids and not text and finish is None:
            return None
        delta = Delta(
            self.index,
            self.count,
            token_ids,
            text,
            logprobs,
            finish,
            output.stop if finish else None,
            self.chars,
        )
        self._count(token_ids, text)
        return delta

    def more(self, output: Output, source: Source, base: int) -> Delta | None:
        """As `take`, of tokens and text that follow right on what was sent; None: they do not.

        Args:
            base: tokens of the completion that its worker does not count.
        """
        _, _, offset, tokens, text, logprobs, *_ = output
        count, chars = len(self._tokens), self.chars
        if (
            offset + base != count
            or source.tokens != count
            or source.chars != chars
            or not tokens
            or (logprobs and len(logprobs) != len(tokens))
        ):
            return None
        self._tokens.extend(tokens)
        source.tokens = count + len(tokens)
        self.chars = source.chars = chars + len(text)
        if chars < _HEAD_CHARS:
            self._head += text[: _HEAD_CHARS - chars]
        return Delta(self.index, count, tokens, text, logprobs, None, None, chars)

    def restore(self, delta: Delta) -> None:
        """Counts as sent what another router has sent. Deltas come in order."""
        self._count(delta.token_ids, delta.text)
        self.finished = self.finished or delta.finish is not None

    def _count(self, token_ids: Sequence[int], text: str) -> None:
        self._tokens.extend(token_ids)
        self.chars += len(text)
        self._head += text[: _HEAD_CHARS - len(self._head)]

    def _new_text(self, text: str, start: int) -> str:
        """What of `text`, which begins at character `start` of the completion, was not sent yet."""
        if start >= self.chars:
            return text
        known = text[: self.chars - start]
        sent = self._head[start : start + len(known)]
        if known[: len(sent)] != sent:
            raise Contradiction("text that differs from what was sent")
        return text[len(known) :]
