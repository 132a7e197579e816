"""What a router has seen of the demand, for the planner: arrivals, lengths, backlog, steps. Pure.

Rates come from arrivals, refused ones too: completions tell of load only once it was served. A
request's output and its cached share are not known when it arrives: they are expected as they were
with one of the latest completions of its class, the output as a share of what the request allows,
so that a change of `max_tokens` shows at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

Kind = tuple[str, str]
"""A model and the name of a class."""

KEPT_ARRIVALS = 2048
KEPT_STEPS = 512
KEPT_SHARES = 64
FIRST_OUTPUT_TOKENS = 256
"""What a request is expected to take before any of its class has ended."""
GAP_GAIN = 0.05


@dataclass(frozen=True)
class Arrived:
    """One request, in tokens; `output` and `cached` as expected."""

    kind: Kind
    prompt: int
    output: int
    cached: int


@dataclass(frozen=True)
class PrefillStep:
    """A prompt's prefill that had its worker to itself."""

    model: str
    new: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class DecodeStep:
    """The mean step of a completion in a batch that held so much context together."""

    model: str
    batch: float
    context: float
    seconds: float


@dataclass(frozen=True)
class DemandReport:
    """What a router has seen. Counts grow from its start on; lists hold what is new to the asker.

    Attributes:
        mark: ask for what comes after it.
        arrivals: by kind; of valid requests, refused ones too.
        ended, attained: by kind; of those that count for attainment.
        burstiness: by kind: variance over mean squared of the gaps between arrivals.
        queued_prompt_tokens: by model: of prompts that arrived and are not computed yet.
    """

    mark: tuple[int, int]
    arrivals: Mapping[Kind, int]
    ended: Mapping[Kind, int]
    attained: Mapping[Kind, int]
    burstiness: Mapping[Kind, float]
    queued_prompt_tokens: Mapping[str, int]
    lengths: tuple[Arrived, ...] = ()
    steps: tuple[PrefillStep | DecodeStep, ...] = ()


@dataclass
class _Class:
    arrivals: int = 0
    ended: int = 0
    attained: int = 0
    last_at: float | None = None
    gap: float = 0.0
    square: float = 0.0
    shares: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT_SHARES))
    turn: int = 0

    def gap_seen(self, seconds: float) -> None:
        if not self.gap:
            self.gap, self.square = seconds, 2 * seconds**2  # Poisson, until more is known
        self.gap += GAP_GAIN * (seconds - self.gap)
        self.square += GAP_GAIN * (seconds**2 - self.square)

    @property
    def burstiness(self) -> float:
        return max(0.0, self.square / self.gap**2 - 1.0) if self.gap > 0 else 1.0


class DemandLog:
    """Takes note of requests by their keys. Bounded: what nobody asks for is dropped."""

    def __init__(self) -> None:
        self._classes: dict[Kind, _Class] = {}
        self._uncomputed: dict[str, tuple[str, int]] = {}
        self._queued: dict[str, int] = {}
        self._arrived: deque[Arrived] = deque(maxlen=KEPT_ARRIVALS)
        self._steps: deque[PrefillStep | DecodeStep] = deque(maxlen=KEPT_STEPS)
        self._arrived_count = self._step_count = 0

    def arrived(self, now: float, key: str, kind: Kind, prompt: int, allowed: int) -> None:
        """A request was taken in; it may generate `allowed` tokens."""
        seen = self._counted(now, kind)
        output, cached = min(allowed, FIRST_OUTPUT_TOKENS), 0
        if seen.shares:
            seen.turn += 1
            used, held = seen.shares[seen.turn % len(seen.shares)]
            output, cached = round(allowed * used), round(prompt * held)
        self._arrived.append(Arrived(kind, prompt, max(1, output), min(cached, prompt - 1)))
        self._arrived_count += 1
        self._uncomputed[key] = (kind[0], prompt)
        self._queued[kind[0]] = self._queued.get(kind[0], 0) + prompt

    def refused(self, now: float, kind: Kind) -> None:
        """A valid request found no room."""
        self._counted(now, kind)

    def computed(self, key: str) -> None:
        """Its prompt is computed."""
        if (waiting := self._uncomputed.pop(key, None)) is not None:
            model, prompt = waiting
            self._queued[model] -= prompt

    def completed(self, kind: Kind, used: float, cached: float) -> None:
        """A completion has ended, with these shares of the output allowed and of the prompt."""
        self._class(kind).shares.append((used, cached))

    def counted(self, kind: Kind, attained: bool) -> None:
        """A request counts for attainment."""
        seen = self._class(kind)
        seen.ended += 1
        seen.attained += attained

    def measured(self, step: PrefillStep | DecodeStep) -> None:
        self._steps.append(step)
        self._step_count += 1

    def since(self, mark: tuple[int, int] | None) -> DemandReport:
        """All counts, and what came after `mark`; None: nothing yet."""
        mark = mark or (self._arrived_count, self._step_count)
        return DemandReport(
            (self._arrived_count, self._step_count),
            {kind: seen.arrivals for kind, seen in self._classes.items()},
            {kind: seen.ended for kind, seen in self._classes.items()},
            {kind: seen.attained for kind, seen in self._classes.items()},
            {kind: seen.burstiness for kind, seen in self._classes.items()},
            dict(self._queued),
            _latest(self._arrived, self._arrived_count - mark[0]),
            _latest(self._steps, self._step_count - mark[1]),
        )

    def _class(self, kind: Kind) -> _Class:
        seen = self._classes.get(kind)
        if seen is None:
            seen = self._classes[kind] = _Class()
        return seen

    def _counted(self, now: float, kind: Kind) -> _Class:
        seen = self._class(kind)
        seen.arrivals += 1
        if seen.last_at is not None:
            seen.gap_seen(max(0.0, now - seen.last_at))
        seen.last_at = now
        return seen


def _latest(kept: deque[T], count: int) -> tuple[T, ...]:
    return tuple(islice(kept, max(0, len(kept) - max(0, count)), None))
