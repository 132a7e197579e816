"""What became of the requests that ended within the last minute, for operators. Pure."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.attainment import ATTAINED

WINDOW_SECONDS = 60.0
KEPT_REQUESTS = 4096


@dataclass(frozen=True)
class Quantiles:
    """Seconds, by nearest rank."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class ServedLately:
    """As in operator.proto; quantiles are None of nothing."""

    seconds: float
    requests: int
    attained: int
    missed: Mapping[str, int]
    ttft: Quantiles | None
    tpot: Quantiles | None


@dataclass(frozen=True)
class _Ended:
    at: float
    reason: str
    ttft: tuple[float, ...]
    tpot: tuple[float, ...]


class Lately:
    """Takes note of requests as they end. Bounded: of more than `KEPT_REQUESTS` the latest.

    Args:
        now: when the router began; seconds.
    """

    def __init__(self, now: float) -> None:
        self._began = now
        self._ended: deque[_Ended] = deque(maxlen=KEPT_REQUESTS)

    def ended(
        self, now: float, reason: str, ttft: Sequence[float] = (), tpot: Sequence[float] = ()
    ) -> None:
        """A valid request is over.

        Args:
            reason: why it missed its targets, or `ATTAINED`.
            ttft, tpot: of its completions, if it succeeded, in seconds.
        """
        self._ended.append(_Ended(now, reason, tuple(ttft), tuple(tpot)))

    def report(self, now: float) -> ServedLately:
        """Of the minute before `now`."""
        full = len(self._ended) == KEPT_REQUESTS
        since = max(now - WINDOW_SECONDS, self._ended[0].at if full else self._began)
        ended = [each for each in self._ended if each.at >= since]
        reasons = Counter(each.reason for each in ended)
        attained = reasons.pop(ATTAINED, 0)
        return ServedLately(
            now - since,
            len(ended),
            attained,
            reasons,
            _quantiles([seconds for each in ended for seconds in each.ttft]),
            _quantiles([seconds for each in ended for seconds in each.tpot]),
        )


def _quantiles(seconds: list[float]) -> Quantiles | None:
    if not seconds:
        return None
    seconds.sort()
    p50, p90, p99 = (seconds[math.ceil(q * len(seconds)) - 1] for q in (0.5, 0.9, 0.99))
    return Quantiles(p50, p90, p99)
