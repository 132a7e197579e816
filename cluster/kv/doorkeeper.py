"""Who may push: the judge of tickets at the transfer port.

A ticket is good once per prefill rank, for one life of one worker. What is checked first is cheap:
nothing of a ticket is parsed before its signature has been verified.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.errors import HandoffRefused
from cluster.kv.geometry import KvGeometry, Route, routes, same_blocks
from cluster.ticket import Ticket, TicketSigner

K = TypeVar("K", bound=Hashable)

SPENT_SECONDS = 60.0
"""A spent ticket is remembered so long after it has expired."""
CLOSED_SECONDS = 120.0
"""A closed handoff is remembered so long; later its ticket waits for a request that never comes."""


@dataclass(frozen=True)
class Terms:
    """What this engine rank is; pushes for anything else are refused.

    Attributes:
        layout: fingerprint of what both sides' KV must have in common.
    """

    worker_id: str
    incarnation: str
    layout: str
    geometry: KvGeometry
    rank: int


@dataclass(frozen=True)
class Admitted:
    """A push that may go on.

    Attributes:
        prefill: the sender's geometry.
        route: what this push brings.
        routes: all that this rank gets.
        plain: payloads are in plain order, and blocks of the sender's size.
    """

    ticket: Ticket
    prefill: KvGeometry
    route: Route
    routes: tuple[Route, ...]
    plain: bool


class Recent(Generic[K]):
    """Keys, each until its time is over; forgetting costs a bounded effort per key added."""

    def __init__(self) -> None:
        self._until: OrderedDict[K, float] = OrderedDict()

    def add(self, key: K, now: float, until: float) -> None:
        self._until[key] = until
        self._until.move_to_end(key)
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)

    def __contains__(self, key: K) -> bool:
        return key in self._until


class Doorkeeper:
    """Admits each (ticket, prefill rank) once.

    Args:
        terms: what a push must be for.
    """

    def __init__(self, signer: TicketSigner, terms: Terms) -> None:
        self._signer = signer
        self._terms = terms
        self._spent: Recent[tuple[str, int]] = Recent()
        self._closed: Recent[str] = Recent()

    def admit(self, wire: bytes, rank: int) -> Admitted:
        """Raises HandoffRefused: the push is not for this rank now, or was here before."""
        ticket = self._signer.verify(wire, time.time())
        terms = self._terms
        if (ticket.decode_worker, ticket.decode_incarnation) != (
            terms.worker_id,
            terms.incarnation,
        ):
            raise HandoffRefused("the ticket is for another worker or another life of this one")
        if ticket.layout != terms.layout:
            raise HandoffRefused("the ticket is for another KV layout")
        if ticket.decode_geometry != terms.geometry.encode():
            raise HandoffRefused("the ticket is for another KV geometry")
        prefill = KvGeometry.parse(ticket.prefill_geometry)
        mine = tuple(r for r in routes(prefill, terms.geometry) if r.decode_rank == terms.rank)
        route = next((r for r in mine if r.prefill_rank == rank), None)
        if route is None:
            raise HandoffRefused(f"rank {rank} of prefill has nothing for rank {terms.rank}")
        self._spend(ticket, rank)
        return Admitted(ticket, prefill, route, mine, not same_blocks(prefill, terms.geometry))

    def _spend(self, ticket: Ticket, rank: int) -> None:
        if (ticket.handoff_id, rank) in self._spent or ticket.handoff_id in self._closed:
            raise HandoffRefused("the ticket has been used")
        now = time.monotonic()
        left = max(ticket.expires_at - time.time(), 0)
        self._spent.add((ticket.handoff_id, rank), now, now + left + SPENT_SECONDS)

    def close(self, handoff_id: str) -> None:
        """Its request has ended: nothing may come for it any more."""
        now = time.monotonic()
        self._closed.add(handoff_id, now, now + CLOSED_SECONDS)

    def closed(self, handoff_id: str) -> bool:
        return handoff_id in self._closed
