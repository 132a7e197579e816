"""What became of the requests of `pdserve bench`: percentiles, attainment, rates. Pure."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from cluster.cli.timeline import PHASES
from cluster.simulator.outcome import Percentiles, Targets

LATE_SECONDS, BUSY_SHARE = 0.02, 0.9
"""A client that is later than this with one turn in a hundred, or takes more of a core, is what the
figures are of."""
SHARES = (0.9, 0.99)
"""Of the requests, that meet their targets at the goodput."""


@dataclass(frozen=True)
class Answered:
    """A request that succeeded; seconds and tokens.

    Attributes:
        ttft, tpot: as the router reports them: received to first token, and the mean gap after it.
        first, e2e: the client's, from the call to its first token and to its end.
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
        late: sent so many seconds after it was due.
        reason: why it was refused or failed.
    """

    prompt: int
    output: int
    end: Literal["ok", "refused", "failed"]
    late: float = 0.0
    reason: str = ""
    answered: Answered | None = None

    def meets(self, targets: Targets) -> bool:
        """All of them; what was refused or failed meets none."""
        got = self.answered
        return got is not None and got.ttft <= targets.ttft and got.tpot <= targets.tpot


@dataclass(frozen=True)
class ClientTimes:
    """How late the client's own turns were, in seconds, and the share of a core it took."""

    p99: float
    most: float
    core_share: float

    @classmethod
    def of(cls, late: Iterable[float], core_share: float) -> ClientTimes:
        ordered = list(late) or [0.0]
        return cls(Percentiles.of(ordered).p99, max(ordered), core_share)

    @property
    def was_the_bottleneck(self) -> bool:
        return self.p99 > LATE_SECONDS or self.core_share > BUSY_SHARE


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
        targets: None: there are none to attain.
        cut: requests under way when it was interrupted; they are in nothing else.
    """

    load: str
    rate: float | None
    seconds: float
    seen: Sequence[Seen]
    prompt_tokens: int
    output_tokens: int
    client: ClientTimes
    targets: Targets | None = None
    cut: int = 0
    interrupted: bool = False
    _answers: tuple[Answered, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        answers = tuple(each.answered for each in self.seen if each.answered is not None)
        object.__setattr__(self, "_answers", answers)

    def count(self, end: str) -> int:
        return sum(each.end == end for each in self.seen)

    def per_second(self, count: float) -> float:
        return count / self.seconds if self.seconds > 0 else 0.0

    @property
    def attained(self) -> int:
        """Requests that met all targets."""
        return sum(each.meets(self.targets) for each in self.seen) if self.targets else 0

    @property
    def attainment(self) -> float | None:
        """Their share of all that were offered, refused and failed ones included."""
        if self.targets is None or not self.seen:
            return None
        return self.attained / len(self.seen)

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
        targets = None
        if self.targets is not None:
            named = {"ttft": self.targets.ttft, "tpot": self.targets.tpot}
            targets = {name: t if math.isfinite(t) else None for name, t in named.items()}
        return {
            "load": self.load,
            "rate": self.rate,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "requests": {
                "offered": len(self.seen),
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
            "targets_seconds": targets,
            "attained": self.attained if self.targets else None,
            "attainment": self.attainment,
            "attained_per_second": self.per_second(self.attained) if self.targets else None,
            "phase_seconds": phases,
            "split_requests": self.split,
            "handoff_bytes": self.moved_bytes,
            "client": {
                "late_p99_seconds": self.client.p99,
                "late_most_seconds": self.client.most,
                "core_share": self.client.core_share,
                "was_the_bottleneck": self.client.was_the_bottleneck,
            },
        }


def goodput(runs: Sequence[Run], share: float) -> float | None:
    """The highest rate of those tried at which so many met their targets; None: at none of them."""
    good = [
        run.rate
        for run in runs
        if run.rate is not None and run.attainment is not None and run.attainment >= share
    ]
    return max(good, default=None)
