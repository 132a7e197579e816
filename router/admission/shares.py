"""Who decodes beside whom: strict requests take workers of their own, the others the rest. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from router.admission.offers import Capacity, Offer
from router.bounds import Bounds

_ROUNDING = 1e-9


def keep(bounds: Bounds, capacity: Capacity, offer: Offer) -> bool:
    """Each keeps its bound per token if `offer` decodes too."""
    asked = [*bounds, (offer.tpot_seconds, offer.completions)]
    return _workers(asked, capacity)[0] <= capacity.decode_workers + _ROUNDING


def places(bounds: Bounds, capacity: Capacity) -> float:
    """Sequences that keep their bounds: those that run, and as many as fit of the least strict."""
    asked = list(bounds)
    workers, spare = _workers(asked, capacity)
    least = _each(asked[-1][0], capacity) if asked else math.inf
    free = capacity.decode_workers - workers
    more = free * least if free > 0 else 0.0
    return sum(count for _, count in asked) + spare + more


def _workers(asked: Iterable[tuple[float, int]], capacity: Capacity) -> tuple[float, float]:
    """Workers that it takes, and the places left on them: whole workers for each bound, the
    strictest first, and less strict ones beside them where there is a place. A bound that no worker
    keeps bounds nothing."""
    workers = spare = 0.0
    by_bound = sorted((_each(bound, capacity), count) for bound, count in asked)
    for each, count in by_bound:
        beside = min(spare, count)
        spare -= beside
        if count > beside:
            taken = 1 if math.isinf(each) else math.ceil((count - beside) / each - _ROUNDING)
            workers += taken
            spare += taken * each - (count - beside)
    return workers, spare


def _each(bound: float, capacity: Capacity) -> float:
    """Sequences that keep a bound on one worker."""
    return capacity.paced(bound) / capacity.decode_workers
