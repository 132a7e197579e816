"""Whether a request met its targets, or why not. Pure."""

from __future__ import annotations

from cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    PdserveError,
    PermissionDenied,
    Unauthenticated,
)
from router.generation import Slo
from router.output import Completed

ATTAINED = ""
_THE_CALLERS = (InvalidRequest, NotFound, Unauthenticated, PermissionDenied)


def missed(slo: Slo, end: Completed | PdserveError) -> str | None:
    """Why the targets were missed; `ATTAINED` if they were not; None if it was no valid request."""
    if isinstance(end, _THE_CALLERS):
        return None
    if isinstance(end, Completed):
        if any(c.ttft_seconds > slo.ttft_seconds for c in end.completions):
            return "ttft"
        if any(c.tpot_seconds > slo.tpot_seconds for c in end.completions):
            return "tpot"
        return ATTAINED
    if isinstance(end, Overloaded):
        return "refused"
    if isinstance(end, DeadlineExceeded):
        return "deadline"
    return "cancelled" if isinstance(end, Cancelled) else "failed"
