"""Phase attribution: workers' stamps on the router's clock, cut into phases that leave no gap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from router.output import Phases, WorkerReport


@dataclass
class Stamps:
    """When a completion passed each boundary, in seconds of the router's clock; None if never.

    A boundary that was never passed, or that clock error puts before the one ahead of it, takes the
    time of the one ahead: its phase is 0 and the rest still adds up.
    """

    received: float
    placed: float | None = None
    prefill_scheduled: float | None = None
    first_token: float | None = None
    landed: float | None = None
    decode_scheduled: float | None = None
    second_token: float | None = None

    def prefill_reported(self, arrived: float, report: WorkerReport) -> None:
        """Takes over a prefill worker's stamps; its message arrived at `arrived`."""
        self.prefill_scheduled = _at(arrived, report.scheduled_ago)

    def decode_reported(self, arrived: float, report: WorkerReport) -> None:
        """Takes over a decode worker's stamps, which come with its last message."""
        self.landed = _at(arrived, report.landed_ago)
        self.decode_scheduled = _at(arrived, report.scheduled_ago)
        self.second_token = _at(arrived, report.second_token_ago)

    def whole_reported(self, arrived: float, report: WorkerReport) -> None:
        """Takes over the stamps of a worker that served the sequence whole."""
        self.prefill_scheduled = _at(arrived, report.scheduled_ago)
        self.second_token = _at(arrived, report.second_token_ago)

    def phases(self, finished: float) -> Phases:
        """The phases of a completion that ended at `finished`."""
        placed = _between(self.received, self.placed, finished)
        first_token = _between(placed, self.first_token, finished)
        bounds = [
            self.received,
            placed,
            _between(placed, self.prefill_scheduled, first_token),
            first_token,
        ]
        for stamp in (self.landed, self.decode_scheduled, self.second_token, finished):
            bounds.append(_between(bounds[-1], stamp, finished))
        return Phases(*(after - before for before, after in pairwise(bounds)))


def _at(arrived: float, ago: float | None) -> float | None:
    return None if ago is None else arrived - ago


def _between(low: float, value: float | None, high: float) -> float:
    return low if value is None else min(max(low, value), max(low, high))
