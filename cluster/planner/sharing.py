"""How long steps take beside those of other workers on the same cores, at a load (`Contention`).

The simulator slows each step while others are under way; sizing takes what is under way on average.
Slower steps are under way for longer and slow the others more, which has a balance, or saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.planner.performance import Contention, Performance

ALONE = Contention()
ROUNDS = 24
CLOSE = 1e-3
"""Relative change in a round, at which the balance counts as reached."""
MAX_LOST = 0.9
"""Of a decode worker's time, to handoffs."""


@dataclass(frozen=True)
class Beside:
    """What is under way beside a worker, on average.

    Attributes:
        prefill, decode: steps of other workers, as one that computes prompts and one that decodes
            has them.
        handoffs: that come to a decode worker, 1/s.
    """

    prefill: float
    decode: float
    handoffs: float = 0.0


NOTHING = Beside(0.0, 0.0)


def slowed(worker: Performance, beside: Beside) -> Performance:
    """The worker as all of that slows it; it then has no contention left to count."""
    contention = worker.contention
    lost = min(MAX_LOST, beside.handoffs * contention.handoff)
    prefill = 1 + (contention.prefill - 1) * beside.prefill
    decode = (1 + (contention.decode - 1) * beside.decode) / (1 - lost)
    dispatch = 1 + (contention.dispatch - 1) * min(1.0, beside.prefill)
    slow = replace(worker, contention=ALONE, dispatch=worker.dispatch * dispatch)
    return slow.scaled(prefill, decode)


def in_balance(worker: Performance, beside: Callable[[Performance], Beside]) -> Beside:
    """What is beside workers that are as slow as it makes them; `beside` tells it of any speed."""
    now = beside(slowed(worker, NOTHING))
    for _ in range(ROUNDS):
        before, now = now, beside(slowed(worker, now))
        if _close(before.prefill, now.prefill) and _close(before.decode, now.decode):
            break
    return now


def _close(before: float, now: float) -> bool:
    return abs(now - before) <= CLOSE * max(before, now)
