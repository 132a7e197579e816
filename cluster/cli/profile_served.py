"""What one request of a profile was served, and what a batch of them says of the steps. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cluster.planner.profile import DecodeSample, HandoffSample, LaunchSample, PathSample

MIN_STEPS = 8
"""Of a batch that runs as a whole; fewer say nothing."""
SAME_STEP_SECONDS = 0.003
"""Prompts that began so close together began with one step."""


@dataclass(frozen=True)
class Served:
    """One completion, as the router reports it and as its tokens came; seconds, tokens, bytes.

    Attributes:
        computing: from when to when its prompt was computed, on the caller's clock.
        came: when tokens came, and how many had by then.
        waited: at the prefill engine until its prompt was computed.
    """

    prefill: float
    prompt: int
    cached: int
    decode_worker: str
    handoff: HandoffSample | None
    path: PathSample
    computing: tuple[float, float]
    came: tuple[tuple[float, int], ...]
    prefill_worker: str = ""
    waited: float = 0.0

    @property
    def first_token_at(self) -> float:
        return self.came[0][0]


@dataclass(frozen=True)
class Window:
    """The steps in which all sequences of a batch ran.

    Attributes:
        begins, ends: on the caller's clock; at the ends of steps.
        steps: how many, on average over the sequences.
        context: tokens that they held together, on average.
    """

    begins: float
    ends: float
    steps: float
    context: float

    @property
    def seconds(self) -> float:
        return self.ends - self.begins


def steps_within(batch: Sequence[Served]) -> Window | None:
    """From the last sequence's third token, with which none of them joins any more, to the first
    one's last; None if that is too short."""
    if any(len(served.came) < MIN_STEPS for served in batch):
        return None
    begins = max(next(at for at, count in s.came if count >= 3 or s.came[-1][0] == at)
                 for s in batch)  # fmt: skip
    ends = min(s.came[-1][0] for s in batch)
    parts = [[(at, n) for at, n in s.came if begins <= at <= ends] for s in batch]
    if any(len(part) < 2 or part[-1][1] - part[0][1] < MIN_STEPS for part in parts):
        return None
    step = median((p[-1][0] - p[0][0]) / (p[-1][1] - p[0][1]) for p in parts)
    context = sum(s.prompt + fmean((p[0][1], p[-1][1])) for s, p in zip(batch, parts, strict=True))
    return Window(begins, ends, (ends - begins) / step, context)


def samples_of(batch: Iterable[Served]) -> list[DecodeSample]:
    """One for each worker that decoded some of a batch: its own part of it."""
    by_worker: dict[str, list[Served]] = defaultdict(list)
    for served in batch:
        by_worker[served.decode_worker].append(served)
    found = []
    for group in by_worker.values():
        if (window := steps_within(group)) is not None:
            step = window.seconds / window.steps
            found.append(DecodeSample(len(group), round(window.context), step))
    return found


def launches_of(stream: Iterable[Served]) -> list[LaunchSample]:
    """Of a stream that leaves no engine idle: steps that began behind another and were followed by
    one whose prompts had waited for it."""
    by_worker: dict[str, list[Served]] = defaultdict(list)
    for served in sorted(stream, key=lambda s: s.computing[0]):
        by_worker[served.prefill_worker].append(served)
    found = []
    for group in by_worker.values():
        steps: list[list[Served]] = []
        for served in group:
            if steps and served.computing[0] - steps[-1][0].computing[0] < SAME_STEP_SECONDS:
                steps[-1].append(served)
            else:
                steps.append([served])
        for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
            began, ends = step[0].computing[0], after[0].computing[0]
            waited = any(s.computing[0] - s.waited < (began + ends) / 2 for s in after)
            told = before[0].computing[1] > began and step[0].computing[1] > ends
            if waited and told:
                new = sum(s.prompt - s.cached for s in step)
                found.append(LaunchSample(new, ends - began))
    return found


def busy_seconds(spans: Iterable[tuple[float, float]], begins: float, ends: float) -> float:
    """Of the time from `begins` to `ends`, what at least one span covers."""
    inside = sorted((max(a, begins), min(b, ends)) for a, b in spans if b > begins and a < ends)
    covered, until = 0.0, begins
    for a, b in inside:
        covered += max(0.0, b - max(a, until))
        until = max(until, b)
    return covered
