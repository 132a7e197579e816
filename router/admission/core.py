"""The admission core: bounded queues by class, fair between tenants, in time or refused at once.

Feed it what happens and carry out what it returns:

    offer(now, offer)         a request came: it waits, or Overloaded is raised
    pump(now, capacities)     → Admit, Refuse, Yield; after every other call, and when room changes
    first_token(now, id, …)   its prompt is computed: prefill has room again
    release(now, id, tokens)  it has ended, running or waiting

Interactive requests go first, then standard ones, then batch. A class that had no start for its
patience gets the next one, so that none starves; what that gives batch comes on top of the online
requests' room, and other batch work yields, so that interactive requests never wait for batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from cluster.errors import Overloaded
from router.admission.offers import Admit, Capacity, Effect, Offer, Refuse, SloClass, Yield
from router.admission.pace import PrefillTimes, StartPace
from router.admission.policy import Policy
from router.admission.queue import ClassQueue, Waiting
from router.admission.tenants import TenantBook
from router.admission.usage import Usage

UNBOUNDED = Capacity()
HEADROOM = 2.0
"""A newcomer has to be in time even if the wait were so many times what the pace of late says."""

MAX_PASSED_SECONDS = 5.0
"""A request that finds no room lets others pass for so long, or half its time, and no more."""


class Admission:
    """Every request that waits or runs, by id."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._tenants = TenantBook(policy)
        self._queues = {c: ClassQueue(lambda t: self._policy.tenant(t).weight) for c in SloClass}
        self._waiting = 0
        self._usage = Usage(policy.max_running)
        self._last_start = dict.fromkeys(SloClass, -math.inf)
        self._pace = StartPace()
        self._class_pace = {c: StartPace() for c in SloClass}
        self._prefills = PrefillTimes()
        self._capacities: Mapping[str, Capacity] = {}

    def set_policy(self, now: float, policy: Policy) -> None:
        """From now on; what runs goes on, and what waits keeps its place."""
        self._policy = policy
        self._tenants.set_policy(now, policy)
        self._usage.set_max_running(policy.max_running)

    @property
    def running(self) -> int:
        return len(self._usage)

    @property
    def queued(self) -> int:
        return self._waiting

    def queued_in(self, slo_class: SloClass) -> int:
        return len(self._queues[slo_class])

    def set_share(self, now: float, share: float) -> None:
        """This router grants such a part of each tenant's limits."""
        self._tenants.set_share(now, share)

    def check(self, now: float, tenant: str, slo_class: SloClass) -> None:
        """Raises Overloaded if `offer` is sure to: so that refusing costs no tokenising."""
        self._tenants.check(now, tenant)
        if self.running >= self._policy.max_running:
            self._check_queue(slo_class)

    def offer(self, now: float, offer: Offer) -> None:
        """Takes a request in; the next `pump` may start it.

        Raises:
            Overloaded: its queue is full, its tenant is over a limit, or it cannot be in time.
        """
        self._tenants.check(now, offer.tenant)
        prefill = self._prefills.at_best(offer.model, offer.uncached_tokens)
        if now + prefill > offer.deadline:
            raise Overloaded("the prompt cannot be computed before the deadline", prefill)
        offer = self._with_latest_start(now, offer)
        queue = self._queues[offer.slo_class]
        fits = self._fits(offer) and self._tenants.may_run(offer.tenant)
        if self.queued or not fits:
            self._check_queue(offer.slo_class)
        if not fits or queue.has_before(offer, self._is_long(offer)):
            self._check_in_time(now, offer)
        self._push(now, offer)
        self._tenants.queued(now, offer.tenant, offer.cost)

    def pump(self, now: float, capacities: Mapping[str, Capacity]) -> list[Effect]:
        """What is refused after all, what makes room, what starts; in this order where it matters.

        Args:
            capacities: by model; a model that is missing is unbounded.
        """
        self._capacities = capacities
        waits = self.queued > 0
        if not waits and not self._pace.waiting:
            return []  # The paces need not know of time in which nobody waits.
        for pace in (self._pace, *self._class_pace.values()):
            pace.passes(now)
        if not waits:
            self._note_who_waits()
            return []
        effects = self._expire(now)
        while self.queued and (found := self._next(now)):
            offer, promised, yields = found
            for request_id in yields:
                effects.append(Yield(request_id))
                self._wait_again(now, request_id)
            self._start(now, offer, promised)
            effects.append(Admit(offer.request_id, promised))
        if self.queued:
            effects += self._expire(now)  # What yielded may be past its deadline.
        self._note_who_waits()
        return effects

    def _note_who_waits(self) -> None:
        self._pace.waiting = False
        for slo_class, queue in self._queues.items():
            waits = len(queue) > 0
            self._class_pace[slo_class].waiting = waits
            self._pace.waiting |= waits

    def first_token(self, now: float, request_id: str, uncached: int | None = None) -> None:
        """The first tokens of all its completions came: prefill has room again.

        Args:
            uncached: prompt tokens that were to compute where it was placed; None: as offered.
        """
        if seen := self._usage.first_token(now, request_id):
            offer, seconds = seen
            tokens = offer.uncached_tokens if uncached is None else uncached
            self._prefills.saw(now, offer.model, tokens, seconds)

    def release(self, now: float, request_id: str, tokens: int) -> None:
        """It has ended, running or waiting, after prompt and output took `tokens`."""
        if self._end_running(now, request_id, tokens):
            return
        for queue in self._queues.values():
            if request_id in queue:
                offer = queue.remove(request_id)
                self._waiting -= 1
                self._tenants.left(offer.tenant, ran=False)
                self._tenants.charge(now, offer.tenant, tokens - offer.cost)

    def _expire(self, now: float) -> list[Effect]:
        refused: list[Effect] = []
        for queue in self._queues.values():
            for offer in queue.expired(now):
                refused.append(Refuse(offer.request_id, self._late(offer)))
                self.release(now, offer.request_id, 0)
        return refused

    def _next(self, now: float) -> tuple[Offer, bool, list[str]] | None:
        """What starts next: a request, whether it is promised batch work, and who yields to it."""
        waits: set[str] = set()
        blocked: set[str] = set()
        for head in self._heads(now):
            offer = head.offer
            batch = offer.slo_class is SloClass.BATCH
            if batch and self._starved(now, SloClass.BATCH) and not self._usage.promises:
                return offer, True, []
            if offer.model in (waits if batch else blocked):
                continue
            if self._fits(offer):
                return offer, False, []
            if batch:
                continue
            if yields := self._usage.yielding(offer, self._capacity(offer)):
                return offer, False, yields
            waits.add(offer.model)
            if now - head.since >= min(MAX_PASSED_SECONDS, (offer.start_by - head.since) / 2):
                blocked.add(offer.model)
        return None

    def _heads(self, now: float) -> Iterator[Waiting]:
        """Who may start, in the order to try them."""
        starved = [c for c in (SloClass.STANDARD,) if self._starved(now, c)]
        for slo_class in dict.fromkeys((*starved, *SloClass)):
            yield from self._queues[slo_class].heads(self._tenants.may_run)

    def _starved(self, now: float, slo_class: SloClass) -> bool:
        queue = self._queues[slo_class]
        if not len(queue):
            return False
        since = max(queue.oldest, self._last_start[slo_class])
        return now - since >= self._policy.patience_seconds[slo_class]

    def _start(self, now: float, offer: Offer, promised: bool) -> None:
        self._queues[offer.slo_class].serve(offer.request_id)
        self._waiting -= 1
        self._tenants.started(offer.tenant)
        self._pace.started(offer.cost)
        self._class_pace[offer.slo_class].started(offer.cost)
        self._last_start[offer.slo_class] = now
        if promised:
            self._usage.promise(now, offer)
        else:
            self._usage.start(now, offer, self._capacity(offer))

    def _wait_again(self, now: float, request_id: str) -> None:
        """What was served stays counted; the rest is charged when it has ended."""
        offer = self._usage.end(request_id)
        assert offer is not None
        self._tenants.yields(offer.tenant)
        self._push(now, replace(offer, start_by=offer.deadline))  # It was in time already.

    def _push(self, now: float, offer: Offer) -> None:
        self._queues[offer.slo_class].push(now, offer, self._is_long(offer))
        self._waiting += 1

    def _is_long(self, offer: Offer) -> bool:
        return offer.prompt_tokens > self._capacity(offer).prefill_worker_tokens

    def _end_running(self, now: float, request_id: str, tokens: int) -> bool:
        """False if it does not run."""
        offer = self._usage.end(request_id)
        if offer is None:
            return False
        self._tenants.left(offer.tenant, ran=True)
        self._queues[offer.slo_class].charge(offer.tenant, tokens - offer.cost)
        self._tenants.charge(now, offer.tenant, tokens - offer.cost)
        return True

    def _fits(self, offer: Offer) -> bool:
        share = self._policy.batch_share if offer.slo_class is SloClass.BATCH else 1.0
        return self._usage.fits(offer, self._capacity(offer), share)

    def _capacity(self, offer: Offer) -> Capacity:
        return self._capacities.get(offer.model, UNBOUNDED)

    def _check_queue(self, slo_class: SloClass) -> None:
        waiting = len(self._queues[slo_class])
        if waiting >= self._policy.max_queued:
            raise Overloaded(
                f"{self.running} requests are running and {waiting} {slo_class} ones waiting, "
                "which is all this router takes",
                self._pace.retry_after(sum(q.cost for q in self._queues.values())),
            )

    def _with_latest_start(self, now: float, offer: Offer) -> Offer:
        """Its prompt takes its time as well: of what is left until it is due, half at most."""
        expected = self._capacity(offer).prefill_seconds
        prefill = self._prefills.likely(now, offer.model, offer.uncached_tokens, expected)
        early = min(prefill, max(0.0, offer.start_by - now) / 2)
        return replace(offer, start_by=offer.start_by - early) if early else offer

    def _check_in_time(self, now: float, offer: Offer) -> None:
        """Raises Overloaded if it would start too late, or one that waits would because of it."""
        ahead = self._cost_ahead(offer)
        wait = max(self._wait(offer.slo_class, ahead), self._room_wait(offer, ahead))
        if now + HEADROOM * wait > offer.start_by:
            raise Overloaded(
                f"it would wait {wait:.1f} s, and its first token come after it is due",
                self._pace.retry_after(ahead),
            )
        before = ahead - offer.cost
        for other in self._queues[offer.slo_class].later(offer.start_by):
            before += other.cost
            in_time = other.start_by - now
            pushed = self._wait(offer.slo_class, before + offer.cost)
            if self._wait(offer.slo_class, before) <= in_time < pushed:
                raise Overloaded(
                    "one that came before it would start too late", self._pace.retry_after(before)
                )

    def _wait(self, slo_class: SloClass, tokens: int) -> float:
        """Seconds until so many tokens of it, and of what goes first, have started."""
        return max(self._pace.seconds(tokens), self._class_pace[slo_class].seconds(tokens))

    def _room_wait(self, offer: Offer, ahead: int) -> float:
        """Seconds until decodes have ended that now take the room of so many tokens. Starts are
        quick while a pool fills, and say nothing of what comes then."""
        waiting = sum(queue.cost_of(offer.model) for queue in self._queues.values())
        tokens = min(ahead, waiting + offer.cost)
        return self._usage.room_wait(offer, tokens, self._capacity(offer))

    def _cost_ahead(self, offer: Offer) -> int:
        """Of what starts before it, and its own."""
        more_urgent = list(SloClass)[: list(SloClass).index(offer.slo_class)]
        ahead = sum(self._queues[c].cost for c in more_urgent)
        return ahead + self._queues[offer.slo_class].cost_before(offer.start_by) + offer.cost

    def _late(self, offer: Offer) -> Overloaded:
        retry = self._pace.retry_after(sum(q.cost for q in self._queues.values()))
        return Overloaded("no room came free before its first token was due", retry)
