"""A request as trace spans."""

from __future__ import annotations

from cluster.obs.tracing import Span
from router.output import Completed, CompletionReport


def request_spans(
    start: float,
    end: float,
    attributes: dict[str, str | int | float | bool],
    completed: Completed | None,
) -> list[Span]:
    """The request's span; then its first completion's phases, one after the other, and its handoff.

    Args:
        start, end: seconds since 1970.
    """
    spans = [Span("request", start, end, attributes)]
    if completed is not None:
        report = completed.completions[0]
        at = start
        for phase, seconds in vars(report.phases).items():
            if seconds:
                spans.append(Span(phase, at, at + seconds, {}))
            at += seconds
            if phase == "handoff_wait" and report.handoff is not None:
                spans.append(_handoff(at, report))
    return spans


def _handoff(landed: float, report: CompletionReport) -> Span:
    """Ends when the KV had landed: with the wait for it."""
    moved = report.handoff
    assert moved is not None
    return Span(
        "kv_handoff",
        landed - moved.elapsed_seconds,
        landed,
        {
            "transport": moved.transport,
            "bytes": moved.bytes,
            "messages": moved.messages,
            "held_tokens": moved.held_tokens,
            "transfer_seconds": moved.transfer_seconds,
            "exposed_seconds": report.phases.handoff_wait,
            "overlap_ratio": overlap(report),
        },
    )


def overlap(report: CompletionReport) -> float:
    """The share of a handoff that prefill's compute hid, 0 to 1."""
    moved = report.handoff
    if moved is None or moved.elapsed_seconds <= 0:
        return 1.0
    return max(0.0, 1.0 - report.phases.handoff_wait / moved.elapsed_seconds)
