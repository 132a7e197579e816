"""A step of prompts, and how an engine that plans ahead starts one while another is computed."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.performance import Launch, Performance
from cluster.simulator.job import Job


@dataclass(frozen=True)
class Step:
    """A step of prompts that is started, and its chunks: jobs and new tokens.

    Attributes:
        began: when its launch did; computed_at: when the device is through with it; seconds.
    """

    chunks: list[tuple[Job, int]]
    began: float
    computed_at: float


@dataclass
class Finished:
    """What a run of steps brought about, in the order in which it is told."""

    first_tokens: list[Job]
    ended: list[Job]


def start(
    performance: Performance,
    launch: Launch,
    now: float,
    before: Step | None,
    chunks: list[tuple[Job, int]],
) -> tuple[Step | None, float]:
    """Starts a step of what waits while the one before it may still be computed.

    Returns:
        The step, if there are chunks; and when the engine goes on: the launch is over, and the
        step before is computed. Only then are its tokens told and the next step is planned.
    """
    goes_on = max(now, before.computed_at) if before else now
    if not chunks:
        return None, goes_on
    prompts = tokens_of(chunks)
    computed_at = max(
        goes_on + performance.computing_seconds(prompts),
        now + performance.prefill_batch_seconds(prompts),
    )
    launching = launch.seconds(sum(new for new, _ in prompts), behind=before is not None)
    return Step(chunks, now, computed_at), max(goes_on, now + launching)


def tokens_of(chunks: list[tuple[Job, int]]) -> list[tuple[int, int]]:
    """Of each chunk that was just planned: new tokens, and those cached or computed before."""
    return [(new, job.computed + job.planned - new) for job, new in chunks]


def begun_by(chunks: list[tuple[Job, int]]) -> int:
    """How many of these chunks, which were just planned, are the first of their prompt."""
    return sum(job.computed + job.planned - new == job.cached for job, new in chunks)
