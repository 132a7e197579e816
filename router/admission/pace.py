"""How fast waiting requests start, and how fast a prompt can be computed at best: learned."""

from __future__ import annotations

import math

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 30.0
HALF_LIFE_SECONDS = 10.0
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
    """The fewest seconds a prompt token has taken of late, from start to first token, by model.

    A bound from below: a request that cannot make it at this pace cannot make it at all. It rises
    by a hundredth with each sample, so that a lucky one is forgotten.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def saw(self, model: str, prompt_tokens: int, seconds: float) -> None:
        best = self._seconds.get(model, math.inf) * _FORGET
        self._seconds[model] = min(best, max(0.0, seconds) / max(1, prompt_tokens))

    def seconds(self, model: str, prompt_tokens: int) -> float:
        """For a prompt of that length; 0 as long as nothing is known."""
        return self._seconds.get(model, 0.0) * prompt_tokens
