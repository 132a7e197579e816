"""What one class of requests asks for: how many a second, and how long they are.

A class is a model's traffic with its own targets. Its lengths are a window of the latest requests,
taken at their *arrival*: completions tell of load only after it was served, which an overloaded
cluster does not do (dynamo#8861).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True)
class Lengths:
    """One request's sizes, in tokens.

    Attributes:
        cached: of the prompt, found in a prefix cache.
        output: generated; at least 1.
    """

    prompt: int
    output: int
    cached: int = 0

    @property
    def new(self) -> int:
        """To compute: the last prompt token always is."""
        return max(1, self.prompt - self.cached)


class RecentLengths:
    """The lengths of the latest requests, oldest first."""

    def __init__(self, window: int = 512) -> None:
        self._window: deque[Lengths] = deque(maxlen=window)

    def __len__(self) -> int:
        return len(self._window)

    def observe(self, lengths: Lengths) -> None:
        self._window.append(lengths)

    def sample(self, size: int = 128) -> tuple[Lengths, ...]:
        """At most `size` of them, evenly by prompt length: the tail keeps its share."""
        ordered = sorted(self._window, key=lambda each: (each.new, each.output))
        return thinned(ordered, size)


def thinned(ordered: Iterable[Lengths], size: int) -> tuple[Lengths, ...]:
    """`size` of an ordered sample, evenly spaced."""
    items = tuple(ordered)
    if len(items) <= size:
        return items
    stride = len(items) / size
    return tuple(islice((items[int((i + 0.5) * stride)] for i in range(size)), size))


@dataclass(frozen=True)
class Demand:
    """A class as the planner expects it.

    Attributes:
        rate: requests/s.
        lengths: equally likely.
        burstiness: variance over mean squared of the gaps between arrivals; 1 is Poisson.
    """

    rate: float
    lengths: tuple[Lengths, ...]
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if self.rate > 0 and not self.lengths:
            raise ValueError("a demand without lengths says nothing")
