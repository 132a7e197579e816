"""One class's waiting requests: earliest deadline first, as far as fairness between tenants lets.

Requests wait in lanes, one for each tenant, model and size (longer than a prefill worker's credit,
or not), so that what cannot start yet never stands in front of what can. A tenant's virtual time is
what it was served, in tokens over its weight; tenants within `QUANTUM_TOKENS` of the least served
one compete by deadline, the others wait. After start-time fair queueing (Goyal et al., 1996): a
tenant that comes back starts at the present virtual time, so that pauses are not saved up.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from router.admission.offers import Offer

QUANTUM_TOKENS = 16_384

Lane = tuple[str, str, bool]


@dataclass(frozen=True)
class Waiting:
    """An offer in its lane, when it came there, and its number: it may come there again."""

    offer: Offer
    since: float
    number: int


_SLACK = 64

Place = tuple[int, float, int]
"""In a lane: highest priority first, then what is due first, then what came first."""


def _place(offer: Offer, number: int) -> Place:
    return -offer.priority, offer.start_by, number


class ClassQueue:
    """Waiting requests of one class.

    Args:
        weight: of a tenant.
    """

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._lanes: dict[Lane, list[tuple[Place, str]]] = {}
        self._due: list[tuple[float, int, str]] = []
        self._by_id: dict[str, Waiting] = {}
        self._served: dict[str, float] = {}
        self._present = 0.0
        self._number = 0
        self._latest = -math.inf
        self.cost = 0
        """Of all that wait, in tokens."""
        self._cost_of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def oldest(self) -> float:
        """When the one came that has waited longest. Raises StopIteration if none waits."""
        return next(iter(self._by_id.values())).since

    def cost_of(self, model: str) -> int:
        """Of all of a model that wait."""
        return self._cost_of[model]

    def push(self, now: float, offer: Offer, long: bool) -> None:
        if all(lane[0] != offer.tenant for lane in self._lanes):
            before = self._served.get(offer.tenant, 0.0)
            self._served[offer.tenant] = max(before, self._present)
        self._number += 1
        self._latest = max(self._latest, offer.start_by) if self._by_id else offer.start_by
        name, number = offer.request_id, self._number
        self._by_id[name] = Waiting(offer, now, number)
        self.cost += offer.cost
        self._cost_of[offer.model] += offer.cost
        lane = self._lanes.setdefault((offer.tenant, offer.model, long), [])
        heapq.heappush(lane, (_place(offer, number), name))
        heapq.heappush(self._due, (offer.start_by, number, name))
        if len(self._due) > 2 * len(self._by_id) + _SLACK:
            self._forget_removed()

    def remove(self, request_id: str) -> Offer:
        """Takes it out. Raises KeyError."""
        offer = self._by_id.pop(request_id).offer
        self.cost -= offer.cost
        self._cost_of[offer.model] -= offer.cost
        for lane in [lane for lane in self._lanes if lane[:2] == (offer.tenant, offer.model)]:
            self._head(lane)
        return offer

    def serve(self, request_id: str) -> Offer:
        """Takes it out and counts it as served."""
        offer = self.remove(request_id)
        self._present = max(self._present, self._least(offer.tenant))
        self.charge(offer.tenant, offer.cost)
        return offer

    def charge(self, tenant: str, tokens: int) -> None:
        """Corrects what a tenant counts as served."""
        served = self._served.get(tenant, self._present)
        self._served[tenant] = served + tokens / self._weight(tenant)

    def heads(self, may_run: Callable[[str], bool]) -> list[Waiting]:
        """The first of each lane whose turn it can be, in the order to try them.

        Tenants that must wait for fairness come last: where the others find no room they may.
        """
        heads = [head for lane in list(self._lanes) if (head := self._head(lane))]
        heads = [head for head in heads if may_run(head.offer.tenant)]
        if not heads:
            return []
        least = min(self._served[head.offer.tenant] for head in heads)

        def order(head: Waiting) -> tuple[float, float, float]:
            ahead = self._served[head.offer.tenant] - least
            return ahead if ahead > QUANTUM_TOKENS else 0.0, head.offer.start_by, head.since

        return sorted(heads, key=order)

    def expired(self, now: float) -> list[Offer]:
        """Those whose first token is due; each is told once."""
        due = []
        while self._due and (self._due[0][0] <= now or not self._waits(*self._due[0][1:])):
            _, number, name = heapq.heappop(self._due)
            if self._waits(number, name):
                due.append(self._by_id[name].offer)
        return due

    def cost_before(self, start_by: float) -> int:
        """Of all that is due no later than `start_by`; where all have one target, that is all."""
        if start_by >= self._latest:
            return self.cost
        return sum(w.offer.cost for w in self._by_id.values() if w.offer.start_by <= start_by)

    def later(self, start_by: float) -> list[Offer]:
        """All that is due later, in that order."""
        later = [w.offer for w in self._by_id.values() if w.offer.start_by > start_by]
        return sorted(later, key=lambda offer: offer.start_by)

    def has_before(self, offer: Offer, long: bool) -> bool:
        """Something waits that goes before it in its lane."""
        lane = (offer.tenant, offer.model, long)
        head = self._head(lane) if lane in self._lanes else None
        return head is not None and _place(head.offer, 0) <= _place(offer, 0)

    def _forget_removed(self) -> None:
        """Drops what was removed from the middle of the heaps: they stay in proportion."""
        self._due = [entry for entry in self._due if self._waits(*entry[1:])]
        heapq.heapify(self._due)
        for heap in self._lanes.values():
            heap[:] = [entry for entry in heap if self._waits(entry[0][2], entry[1])]
            heapq.heapify(heap)
        self._lanes = {lane: heap for lane, heap in self._lanes.items() if heap}

    def _least(self, tenant: str) -> float:
        waiting = {lane[0] for lane in self._lanes} | {tenant}
        return min(self._served.get(name, 0.0) for name in waiting)

    def _head(self, lane: Lane) -> Waiting | None:
        """The lane's first, past those that were removed; an empty lane goes."""
        heap = self._lanes[lane]
        while heap:
            (_, _, number), name = heap[0]
            if self._waits(number, name):
                return self._by_id[name]
            heapq.heappop(heap)
        del self._lanes[lane]
        return None

    def _waits(self, number: int, name: str) -> bool:
        """Entries of what was removed stay in the heaps until they come up."""
        waiting = self._by_id.get(name)
        return waiting is not None and waiting.number == number
