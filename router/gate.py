"""The gate: runs the admission core on a clock, in one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from cluster.clock import Clock
from cluster.errors import Overloaded
from router.admission.core import Admission
from router.admission.offers import Admit, Capacity, Offer, Refuse, SloClass, Yield
from router.admission.policy import Policy
from router.generation import Generation

TICK_SECONDS = 0.1
"""How often waiting requests are looked at though nothing happened: for deadlines and patience."""

FIRST_GUESS_TOKENS = 256
_SMOOTHING = 0.05


class Gate:
    """Decides when each request starts.

    Args:
        capacities: by model, as of now.
        admit, refuse, give_way: carry out what was decided for a request, by its key.
        cached: prompt tokens of a request that a worker's prefix cache holds, as far as is known.
    """

    def __init__(
        self,
        policy: Policy,
        capacities: Callable[[], Mapping[str, Capacity]],
        clock: Clock,
        admit: Callable[[str], None],
        refuse: Callable[[str, Overloaded], None],
        give_way: Callable[[str], None],
        cached: Callable[[Generation], int] = lambda _: 0,
    ) -> None:
        self._core = Admission(policy)
        self._capacities = capacities
        self._clock = clock
        self._admit = admit
        self._refuse = refuse
        self._give_way = give_way
        self._cached = cached
        self._output_tokens: dict[str, float] = {}
        self._pumping = False
        self._again = False
        self._tick: asyncio.TimerHandle | None = None

    @property
    def running(self) -> int:
        return self._core.running

    def queued(self, slo_class: SloClass) -> int:
        return self._core.queued_in(slo_class)

    def set_policy(self, policy: Policy) -> None:
        """As `Admission.set_policy`; what may start under it starts."""
        self._core.set_policy(self._clock.now(), policy)
        self.pump()

    def set_share(self, share: float) -> None:
        """As `Admission.set_share`."""
        self._core.set_share(self._clock.now(), share)

    def check(self, tenant: str, slo_class: SloClass) -> None:
        """Raises Overloaded if `offer` is sure to."""
        self._core.check(self._clock.now(), tenant, slo_class)

    def offer(self, key: str, generation: Generation, going_on: bool = False) -> None:
        """Lets a request wait; `pump` next.

        Args:
            going_on: it has its first token already.

        Raises:
            Overloaded: there is no room, or it cannot be in time.
        """
        due = generation.received_at + generation.slo.ttft_seconds
        guess = self._output_tokens.get(generation.model, FIRST_GUESS_TOKENS)
        n = generation.sampling.n
        offer = Offer(
            key,
            generation.tenant,
            generation.slo.slo_class,
            generation.model,
            len(generation.prompt_token_ids),
            n * min(generation.max_tokens, round(guess)),
            generation.deadline if going_on else min(generation.deadline, due),
            generation.deadline,
            n,
            generation.slo.priority,
            generation.slo.tpot_seconds,
            self._cached(generation),
        )
        self._core.offer(self._clock.now(), offer)

    def first_token(self, key: str, uncached: int | None = None) -> None:
        """Its prompt is computed; `uncached` as of `Admission.first_token`."""
        self._core.first_token(self._clock.now(), key, uncached)
        # The token itself leaves at the end of this turn: whom it made room for comes after that.
        asyncio.get_running_loop().call_soon(self.pump)

    def release(self, key: str, generation: Generation, completion_tokens: int) -> None:
        """It has ended, running or waiting."""
        if completion_tokens:
            guess = self._output_tokens.get(generation.model, FIRST_GUESS_TOKENS)
            each = completion_tokens / generation.sampling.n
            self._output_tokens[generation.model] = guess + _SMOOTHING * (each - guess)
        ran = len(generation.prompt_token_ids) + completion_tokens if completion_tokens else 0
        self._core.release(self._clock.now(), key, ran)
        self.pump()

    def pump(self) -> None:
        """Carries out what admission decides now; what that causes is decided afterwards."""
        self._again = True
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._again:
                self._again = False
                for effect in self._core.pump(self._clock.now(), self._capacities()):
                    match effect:
                        case Admit(key, _):
                            self._admit(key)
                        case Refuse(key, error):
                            self._refuse(key, error)
                        case Yield(key):
                            self._give_way(key)
        finally:
            self._pumping = False
        if self._core.queued and self._tick is None:
            self._tick = asyncio.get_running_loop().call_later(TICK_SECONDS, self._ticked)

    def _ticked(self) -> None:
        self._tick = None
        self.pump()
