"""What admission is asked, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cluster.errors import Overloaded


class SloClass(StrEnum):
    """How urgent a request is, most urgent first."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


ONLINE = (SloClass.INTERACTIVE, SloClass.STANDARD)


@dataclass(frozen=True)
class Offer:
    """A request that wants to start.

    Attributes:
        prompt_tokens: that prefill computes at most; n completions share them.
        output_tokens: that decode is expected to hold, of all completions together.
        completions: sequences that decode runs for it.
        start_by: when its first token is due, on the clock that admission is given: beyond it the
            request has missed its target, and waiting on is of no use.
        deadline: when its caller is gone.
        priority: higher goes first among one tenant's requests for one model.
        tpot_seconds: per token after the first, that its caller waits for at most.
        cached_tokens: of its prompt, that a worker's prefix cache is known to hold.
    """

    request_id: str
    tenant: str
    slo_class: SloClass
    model: str
    prompt_tokens: int
    output_tokens: int
    start_by: float
    deadline: float = math.inf
    completions: int = 1
    priority: int = 0
    tpot_seconds: float = math.inf
    cached_tokens: int = 0

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens to compute: the last one always is."""
        return max(1, self.prompt_tokens - self.cached_tokens)

    @property
    def cost(self) -> int:
        """What fairness and the pace of admission count, in tokens."""
        return self.prompt_tokens + self.output_tokens


def unpaced(tpot_seconds: float) -> float:
    """Sequences that may decode at once where their pace is not known: any number."""
    return math.inf


def no_time(size: float) -> float:
    """Seconds that something takes of which nothing is known: none."""
    return 0.0


@dataclass(frozen=True)
class Capacity:
    """What one model's pools take from this router; infinite where it is not known.

    Attributes:
        prefill_tokens: prompt tokens that may be under way to their first token.
        prefill_worker_tokens: the part of one prefill worker; a longer prompt counts as so many.
        kv_tokens: tokens that the decode pool's KV caches hold.
        sequences: that the decode pool's engines step at once.
        paced: of these, how many keep so many seconds per token.
        decode_workers: that share `sequences`, and `paced` ones, in equal parts.
        prefill_seconds: that so many prompt tokens are expected to take, alone on a worker.
        step_seconds: per token, where so many sequences decode at once.
    """

    prefill_tokens: float = math.inf
    prefill_worker_tokens: float = math.inf
    kv_tokens: float = math.inf
    sequences: float = math.inf
    paced: Callable[[float], float] = field(default=unpaced, compare=False)
    decode_workers: int = 1
    prefill_seconds: Callable[[float], float] = field(default=no_time, compare=False)
    step_seconds: Callable[[float], float] = field(default=no_time, compare=False)

    def scaled(self, share: float) -> Capacity:
        """A share of everything but what a single worker takes."""
        if share == 1.0:
            return self
        return replace(
            self,
            prefill_tokens=self.prefill_tokens * share,
            kv_tokens=self.kv_tokens * share,
            sequences=self.sequences * share,
            paced=lambda tpot_seconds: self.paced(tpot_seconds) * share,
        )


@dataclass(frozen=True)
class Admit:
    """It starts now; promised batch work starts on top of what the room holds, and stays."""

    request_id: str
    promised: bool = False


@dataclass(frozen=True)
class Refuse:
    """It has waited in vain: it can no longer start in time."""

    request_id: str
    error: Overloaded


@dataclass(frozen=True)
class Yield:
    """A running batch request gives its place back: it waits again, until the next Admit of it."""

    request_id: str


Effect = Admit | Refuse | Yield
