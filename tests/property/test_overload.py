"""More comes than can be served: what is admitted is in time, the rest is refused as it comes.

The admission core in front of a model of a pool, on a virtual clock: prompts are computed in steps
of at most so many tokens, decodes go on for a while, a sequence's pace is that of the batch.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.errors import Overloaded
from router.admission.core import Admission
from router.admission.offers import Admit, Capacity, Offer, Refuse, SloClass
from router.admission.policy import Policy

STEP_TOKENS = 2000
STEP_SECONDS, TOKEN_SECONDS = 0.02, 1e-4
TTFT_SECONDS = 2.0
OUTPUT = 100
LEARNING_SECONDS, SECONDS = 5.0, 100.0
"""Long enough that chance alone, in so many requests, comes near none of the bounds."""


@dataclass
class Pool:
    """Admission, and what it lets through; `late` are refusals of requests that had waited.

    Args:
        rate: of a Poisson process of prompts of `lengths` tokens.
        decoding: seconds after the first token, on average.
        room: sequences that decode at once.
        known: what admission takes decodes to last, in times of what they do; 0: it does not know.
    """

    rate: float
    lengths: tuple[int, int]
    decoding: float
    room: float
    rng: random.Random
    known: float = 0.0
    until: float = SECONDS
    in_time: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)

    def run(self) -> None:
        self.core = Admission(Policy())
        credit = 2 * STEP_TOKENS
        self.capacity = Capacity(
            credit,
            credit,
            sequences=self.room,
            step_seconds=lambda _: self.known * self.decoding / OUTPUT,
        )
        self.arrived: dict[str, Offer] = {}
        self.prompts: deque[Offer] = deque()
        self.order = itertools.count()
        self.agenda: list[tuple[float, int, str, list[Offer]]] = []
        self.busy = False
        self.at(0.0, "arrival", [])
        while self.agenda:
            now, _, what, offers = heapq.heappop(self.agenda)
            getattr(self, what)(now, offers)
            self.pump(now)

    def at(self, when: float, what: str, offers: list[Offer]) -> None:
        heapq.heappush(self.agenda, (when, next(self.order), what, offers))

    def arrival(self, now: float, _: list[Offer]) -> None:
        name = f"r{next(self.order)}"
        prompt = self.rng.randint(*self.lengths)
        due = now + TTFT_SECONDS
        offer = Offer(name, "t", SloClass.INTERACTIVE, "m", prompt, OUTPUT, due, now + 10.0)
        try:
            self.core.offer(now, offer)
            self.arrived[name] = offer
        except Overloaded:
            self.refused.append(now)
        if now < self.until:
            self.at(now + self.rng.expovariate(self.rate), "arrival", [])

    def pump(self, now: float) -> None:
        for effect in self.core.pump(now, {"m": self.capacity}):
            match effect:
                case Admit(name):
                    self.prompts.append(self.arrived[name])
                case Refuse(name):
                    self.late.append(self.arrived[name].start_by - TTFT_SECONDS)
        if self.prompts and not self.busy:
            self.busy = True
            batch = [self.prompts.popleft()]
            while self.prompts and _tokens([*batch, self.prompts[0]]) <= STEP_TOKENS:
                batch.append(self.prompts.popleft())
            self.at(now + STEP_SECONDS + TOKEN_SECONDS * _tokens(batch), "step_ends", batch)
        if self.core.queued and not any(what == "tick" for _, _, what, _ in self.agenda):
            self.at(now + 0.1, "tick", [])

    def tick(self, now: float, _: list[Offer]) -> None:
        """Those that are late are looked for though nothing happens."""

    def step_ends(self, now: float, batch: list[Offer]) -> None:
        self.busy = False
        for offer in batch:
            self.core.first_token(now, offer.request_id)
            came = offer.start_by - TTFT_SECONDS
            (self.in_time if now <= offer.start_by else self.missed).append(came)
            self.at(now + self.decoding * self.rng.uniform(0.5, 1.5), "ended", [offer])

    def ended(self, now: float, offers: list[Offer]) -> None:
        self.core.release(now, offers[0].request_id, offers[0].cost)

    def goodput(self) -> float:
        """Of what came after the first seconds."""
        return len(_settled(self.in_time)) / (SECONDS - LEARNING_SECONDS)

    @classmethod
    def of(
        cls, overload: float, lengths: tuple[int, int], decoding: float, decode_bound: bool,
        seed: int, known: float = 0.0, until: float = SECONDS,
    ) -> tuple[Pool, float]:  # fmt: skip
        """One that so many times its capacity comes to, and that capacity, requests a second."""
        mean = sum(lengths) / 2
        capacity = 1 / (mean * TOKEN_SECONDS + STEP_SECONDS * mean / STEP_TOKENS)
        room = 1e9
        if decode_bound:
            room = max(4.0, 0.6 * capacity * decoding)
            capacity = room / (decoding + mean * TOKEN_SECONDS + STEP_SECONDS)
        rng = random.Random(seed)
        return cls(overload * capacity, lengths, decoding, room, rng, known, until), capacity


def _tokens(offers: list[Offer]) -> int:
    return sum(offer.prompt_tokens for offer in offers)


def _settled(came: list[float]) -> list[float]:
    return [at for at in came if LEARNING_SECONDS <= at < SECONDS]


@given(
    overload=st.sampled_from((1.2, 2.0, 4.0)),
    lengths=st.sampled_from(((500, 500), (100, 900), (50, 1950))),
    decoding=st.sampled_from((0.5, 3.0)),
    decode_bound=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_overload_is_refused_as_it_comes_and_the_rest_is_in_time(
    overload: float, lengths: tuple[int, int], decoding: float, decode_bound: bool, seed: int
) -> None:
    """Whichever pool is too small: at any multiple of the capacity the goodput is nearly all of
    it, and hardly anyone waits to be refused."""
    pool, capacity = Pool.of(overload, lengths, decoding, decode_bound, seed)
    pool.run()
    offered = len(_settled(pool.in_time + pool.missed + pool.refused + pool.late))
    assert pool.goodput() >= 0.8 * capacity
    assert len(_settled(pool.late)) <= 0.02 * offered
    assert len(_settled(pool.missed)) <= 0.01 * offered


def test_a_cold_router_that_knows_how_long_decodes_last_lets_fewer_wait_in_vain() -> None:
    """In the first seconds, while the pool fills: starts are quick, and nothing has ended yet."""

    def cold(known: float) -> tuple[int, int]:
        late = in_time = 0
        for overload, lengths, seed in itertools.product(
            (2.0, 4.0), ((500, 500), (50, 1950)), range(2)
        ):
            pool, _ = Pool.of(overload, lengths, 6.0, True, seed, known, LEARNING_SECONDS)
            pool.run()
            late += len(pool.late) + len(pool.missed)
            in_time += len(pool.in_time)
        return late, in_time

    blind, foreseen = cold(0.0), cold(1.0)
    assert foreseen[0] <= 0.7 * blind[0]
    assert foreseen[1] >= 0.95 * blind[1]
