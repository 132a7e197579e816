"""How fast waiting requests start, and how fast a prompt can be computed at best: learned."""

from __future__ import annotations

import math

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 30.0
HALF_LIFE_SECONDS = 10.0
MIN_SAMPLES = 8
_FORGET = 1.01


class StartPace:
    """Tokens of requests started per second, over the time in which some were waiting.

    Both sums halve every `HALF_LIFE_SECONDS` of that time, so that the rate follows the load.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._at: float | None = None

    def waits(self, now: float, waiting: bool) -> None:
        """Whether requests wait from now on; call it whenever one came or went."""
        if self._at is not None:
            passed = max(0.0, now - self._at)
            keep = 0.5 ** (passed / HALF_LIFE_SECONDS)
            self._tokens *= keep
            self._seconds = self._seconds * keep + passed
        self._at = now if waiting else None

    def started(self, tokens: int) -> None:
        """A request started that had waited, or that left none of the room others wait for."""
        if self._at is not None:
            self._tokens += tokens

    def seconds(self, tokens: float) -> float:
        """Until so many waiting tokens have started; 0 as long as nothing is known."""
        if self._tokens <= 0 or self._seconds < 0.05:
            return 0.0
        return tokens * self._seconds / self._tokens

    def retry_after(self, tokens: float) -> float:
        """When half of what waits will have started."""
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, self.seconds(tokens / 2)))


class BestPrefill:
    """The quickest of late from start to first token, by model and size of the prompt.

    A bound from below, for prompts between two powers of two: one that cannot make it at this pace
    cannot make it at all. Prompts that a cache held are among them, so it errs towards admission.
    It says nothing before `MIN_SAMPLES`, and rises by a hundredth with each, so that a lucky one is
    forgotten.
    """

    def __init__(self) -> None:
        self._best: dict[tuple[str, int], tuple[int, float, float]] = {}

    def saw(self, model: str, prompt_tokens: int, seconds: float) -> None:
        size = (model, prompt_tokens.bit_length())
        count, best, best_each = self._best.get(size, (0, math.inf, math.inf))
        best = min(best * _FORGET, seconds)
        best_each = min(best_each * _FORGET, seconds / max(1, prompt_tokens))
        self._best[size] = (count + 1, best, best_each)

    def seconds(self, model: str, prompt_tokens: int) -> float:
        """For a prompt of that length; 0 as long as too little is known."""
        size = (model, prompt_tokens.bit_length())
        count, best, best_each = self._best.get(size, (0, 0.0, 0.0))
        return min(best, best_each * prompt_tokens) if count >= MIN_SAMPLES else 0.0
