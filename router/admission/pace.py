"""How fast waiting requests start, and how long prompts take from there: learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from router.admission.offers import no_time

MIN_RETRY_SECONDS = 0.1
MAX_RETRY_SECONDS = 30.0
HALF_LIFE_SECONDS = 5.0
KEPT_SECONDS = 1.0
MIN_SECONDS = 0.05
MIN_SAMPLES = 8
DEVIATIONS = 2.0
_FORGET = 1.01


class StartPace:
    """Tokens of requests started per second, over the time in which some were waiting.

    Both sums halve every `HALF_LIFE_SECONDS`, so that the rate follows the load; what
    `KEPT_SECONDS` of waiting say is kept until something newer is known.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._at = 0.0
        self.waiting = False
        """Some requests wait from now on; whoever sees them come and go says so."""

    def passes(self, now: float) -> None:
        """Time goes by, up to `now`."""
        passed = max(0.0, now - self._at)
        keep = 0.5 ** (passed / HALF_LIFE_SECONDS)
        if self._seconds * keep < KEPT_SECONDS:
            keep = min(1.0, KEPT_SECONDS / self._seconds) if self._seconds else 1.0
        self._tokens *= keep
        self._seconds *= keep
        if self.waiting:
            self._seconds += passed
        self._at = now

    def started(self, tokens: int) -> None:
        """A request started; it counts if some have waited for room."""
        if self.waiting:
            self._tokens += tokens

    def seconds(self, tokens: float) -> float:
        """Until so many waiting tokens have started; 0 as long as nothing is known."""
        if self._tokens <= 0 or self._seconds < MIN_SECONDS:
            return 0.0
        return tokens * self._seconds / self._tokens

    def retry_after(self, tokens: float) -> float:
        """When half of what waits will have started."""
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, self.seconds(tokens / 2)))


@dataclass
class _Seen:
    """Prompts of about one size: the quickest, and sums that fade.

    Attributes:
        best, best_each: seconds, and seconds per token, of the quickest of late.
        weight, mean, spread: of the others, as of `at`; spread is the sum of squares about the
            mean.
    """

    count: int = 0
    best: float = math.inf
    best_each: float = math.inf
    weight: float = 0.0
    mean: float = 0.0
    spread: float = 0.0
    at: float = 0.0

    def fade(self, now: float) -> None:
        keep = 0.5 ** (max(0.0, now - self.at) / HALF_LIFE_SECONDS)
        self.weight *= keep
        self.spread *= keep
        self.at = now


class PrefillTimes:
    """Seconds from start to first token, by model and prompt tokens to compute: those that no
    prefix cache holds.

    Prompts between two powers of two are taken together. Before `MIN_SAMPLES` nothing is said but
    what is expected.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], _Seen] = {}

    def saw(self, now: float, model: str, uncached: int, seconds: float) -> None:
        seen = self._seen.setdefault((model, uncached.bit_length()), _Seen(at=now))
        seen.count += 1
        # They rise with each, so that a lucky one is forgotten.
        seen.best = min(seen.best * _FORGET, seconds)
        seen.best_each = min(seen.best_each * _FORGET, seconds / max(1, uncached))
        seen.fade(now)
        # West's update of a weighted mean and its sum of squares (CACM 22(9), 1979).
        seen.weight += 1.0
        off = seconds - seen.mean
        seen.mean += off / seen.weight
        seen.spread += off * (seconds - seen.mean)

    def at_best(self, model: str, uncached: int) -> float:
        """A bound from below: a prompt that cannot make it at this pace cannot make it at all.
        Some found more in a cache than was known, so it errs towards admission."""
        seen = self._seen.get((model, uncached.bit_length()))
        if seen is None or seen.count < MIN_SAMPLES:
            return 0.0
        return min(seen.best, seen.best_each * uncached)

    def likely(
        self, now: float, model: str, uncached: int, expected: Callable[[float], float] = no_time
    ) -> float:
        """What most take: the mean and two deviations, as of late."""
        seen = self._seen.get((model, uncached.bit_length()))
        if seen is None or seen.count < MIN_SAMPLES:
            return expected(uncached)
        seen.fade(now)
        if seen.weight < 1.0:  # Too long ago to say more than this.
            return self.at_best(model, uncached)
        return seen.mean + DEVIATIONS * math.sqrt(seen.spread / seen.weight)
