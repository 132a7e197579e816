"""What became of the requests of `pdserve bench`: percentiles, attainment, rates. Pure."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from cluster.cli.timeline import PHASES
from cluster.simulator.outcome import Percentiles, Targets

LATE_SECONDS, BUSY_SHARE, STALL_SECONDS = 0.02, 0.9, 1.0
"""A client that is later than the first a hundredth of the time, or with one request in a hundred,
takes more of a core, or stands still for longer at a time, is what the figures are of."""
SHARES = (0.9, 0.99)
"""Of the requests, that meet their targets at the goodput."""


@dataclass(frozen=True)
class Answered:
    """A request that succeeded; seconds and tokens.

    Attributes:
        ttft, tpot: as the router reports them: received to first token, and the mean gap after it.
        first, e2e: the client's, to its first token and to its end: from when it was due, in a
            closed loop from the call. What it waited for on this side is in them.
        gaps: between tokens, the client's; 0 between those of one message.
        phases: the router's, in the order of `PHASES`.
        moved: KV bytes that were handed off; None: nothing was.
    """

    ttft: float
    tpot: float
    first: float
    e2e: float
    gaps: array[float]
    cached: int
    phases: tuple[float, ...]
    moved: int | None


@dataclass(frozen=True)
class Seen:
    """What became of one request.

    Attributes:
        late: sent so many seconds after it was due; None: it was due at no time, or never sent.
        reason: why it was refused or failed.
        slo_class: whose targets it has.
    """

    prompt: int
    output: int
    end: Literal["ok", "refused", "failed"]
    late: float | None = None
    reason: str = ""
    answered: Answered | None = None
    slo_class: str = ""

    def meets(self, targets: Targets) -> bool:
        """All of them; what was refused or failed meets none."""
        got = self.answered
        return got is not None and got.ttft <= targets.ttft and got.tpot <= targets.tpot


@dataclass(frozen=True)
class ClientTimes:
    """How late the client itself was, in seconds, and the share of a core it took.

    Attributes:
        turns_p99: 99 % of the time its event loop came back to a waiting task within this.
        turns_most: the longest that one waited for it.
        requests_p99: of requests, from when they were due to when they were sent; None: of none.
    """

    turns_p99: float
    turns_most: float
    requests_p99: float | None
    core_share: float

    @classmethod
    def of(
        cls, turns: Sequence[float], requests: Sequence[float], every: float, core_share: float
    ) -> ClientTimes:
        """
        Args:
            turns: how late each was; while one was late no other could be.
            requests: how late each was.
            every: seconds between two turns that are not late.
        """
        known = sorted(turns) or [0.0]
        left = 0.01 * sum(every + late for late in known)
        p99 = known[-1]
        for late in reversed(known):
            p99, left = late, left - (every + late)
            if left < 0:
                break
        of_requests = Percentiles.of(list(requests)).p99 if requests else None
        return cls(p99, known[-1], of_requests, core_share)

    @property
    def was_the_bottleneck(self) -> bool:
        late = max(self.turns_p99, self.requests_p99 or 0.0) > LATE_SECONDS
        return late or self.turns_most > STALL_SECONDS or self.core_share > BUSY_SHARE


@dataclass(frozen=True)
class Spread:
    """Of a quantity, in seconds; NaN of nothing."""

    percentiles: Percentiles
    mean: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = list(values)
        return cls(Percentiles.of(known), fmean(known) if known else math.nan)

    def values(self) -> dict[str, float | None]:
        """In seconds; None of nothing."""
        named = {**vars(self.percentiles), "mean": self.mean}
        return {name: value if math.isfinite(value) else None for name, value in named.items()}


@dataclass(frozen=True)
class Run:
    """A load and what came of it.

    Attributes:
        load: in words.
        rate: requests a second that were to come; None: a closed loop, or a trace.
        seconds: that were measured.
        seen: the requests that came in them, in whatever order they ended.
        prompt_tokens: of prompts whose first token came in these seconds.
        output_tokens: that came in them.
        targets: by class, of those that have any to attain.
        cut: requests under way when it was interrupted; they are in nothing else.
    """

    load: str
    rate: float | None
    seconds: float
    seen: Sequence[Seen]
    prompt_tokens: int
    output_tokens: int
    client: ClientTimes
    targets: Mapping[str, Targets] = field(default_factory=dict)
    cut: int = 0
    interrupted: bool = False
    _answers: tuple[Answered, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        answers = tuple(each.answered for each in self.seen if each.answered is not None)
        object.__setattr__(self, "_answers", answers)

    def count(self, end: str) -> int:
        return sum(each.end == end for each in self.seen)

    @property
    def unserved_share(self) -> float:
        """Of the requests that came, those that were refused or failed; 0 of none."""
        unserved = len(self.seen) - self.count("ok")
        return unserved / len(self.seen) if self.seen else 0.0

    def per_second(self, count: float) -> float:
        return count / self.seconds if self.seconds > 0 else 0.0

    @property
    def with_targets(self) -> int:
        """Requests of a class that has targets."""
        return sum(each.slo_class in self.targets for each in self.seen)

    @property
    def attained(self) -> int:
        """Those of them that met all of their class's."""
        of = self.targets
        return sum(each.slo_class in of and each.meets(of[each.slo_class]) for each in self.seen)

    @property
    def attainment(self) -> float | None:
        """Their share of all with targets that were offered, refused and failed ones included."""
        offered = self.with_targets
        return self.attained / offered if offered else None

    def spreads(self) -> dict[str, Spread]:
        """By name. `ttft` and `tpot` are the router's, the others the client's."""
        got = self._answers
        return {
            "ttft": Spread.of(a.ttft for a in got),
            "tpot": Spread.of(a.tpot for a in got if a.gaps),
            "client_ttft": Spread.of(a.first for a in got),
            "itl": Spread.of(gap for a in got for gap in a.gaps),
            "e2e": Spread.of(a.e2e for a in got),
        }

    def phases(self) -> dict[str, float]:
        """The mean request's seconds in each phase."""
        got = self._answers
        return {
            name: fmean(a.phases[i] for a in got) if got else math.nan
            for i, name in enumerate(PHASES)
        }

    def reasons(self) -> Counter[tuple[str, str]]:
        """(refused or failed, why), numbers left out: how often."""
        bad = (each for each in self.seen if each.end != "ok")
        return Counter((each.end, re.sub(r"\d[\d.,]*", "…", each.reason)) for each in bad)

    @property
    def split(self) -> int:
        """Requests whose KV was handed off."""
        return sum(a.moved is not None for a in self._answers)

    @property
    def moved_bytes(self) -> int:
        return sum(a.moved or 0 for a in self._answers)

    @property
    def cached_share(self) -> float:
        """Of the prompts' tokens, that prefix caches held."""
        prompts = sum(each.prompt for each in self.seen if each.end == "ok")
        return sum(a.cached for a in self._answers) / prompts if prompts else 0.0

    def values(self) -> dict[str, Any]:
        """For `--json`; seconds, tokens, bytes, requests."""
        phases = {n: s if math.isfinite(s) else None for n, s in self.phases().items()}
        targets = {
            slo_class: {name: t if math.isfinite(t) else None for name, t in vars(of).items()}
            for slo_class, of in self.targets.items()
        }
        return {
            "load": self.load,
            "rate": self.rate,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "requests": {
                "offered": len(self.seen),
                "with_targets": self.with_targets,
                **{end: self.count(end) for end in ("ok", "refused", "failed")},
                "cut_off": self.cut,
                "offered_per_second": self.per_second(len(self.seen)),
            },
            "reasons": [
                {"end": end, "reason": why, "requests": n}
                for (end, why), n in self.reasons().most_common()
            ],
            "prompt_tokens_per_second": self.per_second(self.prompt_tokens),
            "output_tokens_per_second": self.per_second(self.output_tokens),
            "cached_prompt_share": self.cached_share,
            **{f"{name}_seconds": spread.values() for name, spread in self.spreads().items()},
            "targets_seconds": targets or None,
            "attained": self.attained if self.targets else None,
            "attainment": self.attainment,
            "attained_per_second": self.per_second(self.attained) if self.targets else None,
            "phase_seconds": phases,
            "split_requests": self.split,
            "handoff_bytes": self.moved_bytes,
            "client": {
                "turns_late_p99_seconds": self.client.turns_p99,
                "turns_late_most_seconds": self.client.turns_most,
                "requests_late_p99_seconds": self.client.requests_p99,
                "core_share": self.client.core_share,
                "was_the_bottleneck": self.client.was_the_bottleneck,
            },
        }


def goodput(runs: Sequence[Run], share: float) -> float | None:
    """The highest rate of those tried to the end at which so many met their targets; None: at none
    of them."""
    good = [
        run.rate
        for run in runs
        if not run.interrupted
        and run.rate is not None
        and run.attainment is not None
        and run.attainment >= share
    ]
    return max(good, default=None)
