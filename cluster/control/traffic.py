"""What the routers have seen, as the planner takes it: rates since the last look. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.planner.demand import Lengths
from cluster.planner.state import Traffic
from router.demand import DecodeStep, DemandReport, Kind, PrefillStep

Life = tuple[str, str]
"""A router and its incarnation."""

RECENT_SECONDS = 300.0
"""Attainment is told of the requests that ended within this."""


@dataclass(frozen=True)
class Look:
    """All routers at one moment.

    Attributes:
        traffic: by model and class; a class that never had a request is not there.
        queued: prompt tokens by model.
    """

    at: float
    traffic: Mapping[str, Mapping[str, Traffic]]
    queued: Mapping[str, int]
    steps: tuple[PrefillStep | DecodeStep, ...]


@dataclass
class _Seen:
    """One router's counts at the last look."""

    mark: tuple[int, int]
    arrivals: Mapping[Kind, int]
    ended: Mapping[Kind, int]
    attained: Mapping[Kind, int]


@dataclass
class TrafficBook:
    """Keeps what was seen of each router's life, and makes rates of the differences."""

    _lives: dict[Life, _Seen] = field(default_factory=dict)
    _looked_at: float | None = None
    _recent: list[tuple[float, dict[Kind, tuple[int, int]]]] = field(default_factory=list)

    def mark(self, life: Life) -> tuple[int, int] | None:
        """What to ask that router from; None: it has not been asked yet."""
        seen = self._lives.get(life)
        return seen.mark if seen else None

    def look(self, now: float, reports: Mapping[Life, DemandReport]) -> Look | None:
        """Reports of all living routers; None for the first ones, which only begin the count.

        A router that was not there at the last look began to count after it.
        """
        seconds = now - self._looked_at if self._looked_at is not None else 0.0
        first, self._looked_at = self._looked_at is None, now
        arrived: dict[Kind, int] = {}
        ended: dict[Kind, tuple[int, int]] = {}
        for life, report in reports.items():
            before = self._lives.get(life) or _Seen((0, 0), {}, {}, {})
            for kind, count in report.arrivals.items():
                more = count - before.arrivals.get(kind, 0)
                arrived[kind] = arrived.get(kind, 0) + more
            for kind, count in report.ended.items():
                good = report.attained.get(kind, 0) - before.attained.get(kind, 0)
                all_, met = ended.get(kind, (0, 0))
                ended[kind] = all_ + count - before.ended.get(kind, 0), met + good
        self._lives = {
            life: _Seen(r.mark, r.arrivals, r.ended, r.attained) for life, r in reports.items()
        }
        self._recent = [(at, e) for at, e in self._recent if at > now - RECENT_SECONDS]
        self._recent.append((now, ended))
        if first or seconds <= 0:
            return None
        traffic: dict[str, dict[str, Traffic]] = {}
        queued: dict[str, int] = {}
        for kind, count in arrived.items():
            bursts = [r.burstiness[kind] for r in reports.values() if kind in r.burstiness]
            lengths = tuple(
                Lengths(each.prompt, each.output, each.cached)
                for report in reports.values()
                for each in report.lengths
                if each.kind == kind
            )
            model, name = kind
            traffic.setdefault(model, {})[name] = Traffic(
                count / seconds, lengths, sum(bursts) / len(bursts) if bursts else 1.0
            )
        for report in reports.values():
            for model, tokens in report.queued_prompt_tokens.items():
                queued[model] = queued.get(model, 0) + tokens
        steps = tuple(step for report in reports.values() for step in report.steps)
        return Look(now, traffic, queued, steps)

    def attainment(self, model: str) -> dict[str, float]:
        """By class: of the requests that ended of late, the share that met their targets."""
        sums: dict[str, tuple[int, int]] = {}
        for _, ended in self._recent:
            for (of, name), (all_, met) in ended.items():
                if of == model:
                    before = sums.get(name, (0, 0))
                    sums[name] = before[0] + all_, before[1] + met
        return {name: met / all_ for name, (all_, met) in sums.items() if all_}
