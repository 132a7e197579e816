"""Production's admission between the workload and the workers, with the capacity of the fleet."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import Overloaded
from cluster.simulator.events import Agenda
from cluster.simulator.fleet import Deployment, Fleet
from cluster.simulator.worker import MODEL
from router.admission.core import Admission
from router.admission.offers import Admit, Capacity, Offer, Refuse, SloClass, Yield
from router.admission.policy import Policy
from router.capacity import PREFILL_STEPS

TENANT = "default"
TICK_SECONDS = 0.05
"""While requests wait, those that are late by now are looked for so often, as by the router."""


class Gate:
    """Who starts when. A reservation counts a request's true output, which a router guesses.

    Args:
        paced: adds to the pools' capacity what is known of their pace.
        admit, refuse: are called with a request's key, as soon as admission decides.
    """

    def __init__(
        self,
        deployment: Deployment,
        fleet: Fleet,
        agenda: Agenda,
        paced: Callable[[Capacity], Capacity],
        admit: Callable[[str], None],
        refuse: Callable[[str, Overloaded], None],
    ) -> None:
        self._deployment = deployment
        self._fleet = fleet
        self._agenda = agenda
        self._paced = paced
        self._admit = admit
        self._refuse = refuse
        self._core = Admission(Policy(deployment.max_running, deployment.max_queued))
        self._capacity: dict[str, Capacity] = {}
        self._pumping = self._again = self._ticking = False
        self.workers_changed()

    @property
    def queued(self) -> int:
        return self._core.queued

    def workers_changed(self) -> None:
        """Works the capacity out anew, as `router.capacity` does from the registry."""
        ready = [w for w in self._fleet.workers.values() if w.phase == "ready"]
        prefills = sum(w.role in ("prefill", "both") for w in ready)
        decodes = [w for w in ready if w.role in ("decode", "both")]
        limits = self._deployment.limits
        credit = PREFILL_STEPS * limits.max_tokens
        self._capacity = {}
        if prefills and decodes and self._deployment.late_admission:
            pools = Capacity(
                prefills * credit,
                credit,
                sum(w.engine.performance.kv_capacity for w in decodes),
                len(decodes) * limits.max_sequences,
                decode_workers=len(decodes),
            )
            self._capacity[MODEL] = self._paced(pools)

    def offer(self, key: str, prompt: int, output: int, deadline: float, start_by: float) -> None:
        """Lets a request wait; it may start at once. Raises Overloaded."""
        offer = Offer(
            key, TENANT, SloClass.STANDARD, MODEL, prompt, output, start_by, deadline,
            tpot_seconds=self._deployment.pace_within,
        )  # fmt: skip
        self._core.offer(self._agenda.now, offer)

    def first_token(self, key: str) -> None:
        """Its prompt is computed."""
        self._core.first_token(self._agenda.now, key)
        self.pump()

    def release(self, key: str, tokens: int) -> None:
        """It has ended, running or waiting."""
        self._core.release(self._agenda.now, key, tokens)
        self.pump()

    def pump(self) -> None:
        """Carries out what admission decides now; what that causes is decided afterwards."""
        self._again = True
        if self._pumping:
            return
        self._pumping = True
        while self._again:
            self._again = False
            for effect in self._core.pump(self._agenda.now, self._capacity):
                match effect:
                    case Admit(key):
                        self._admit(key)
                    case Refuse(key, error):
                        self._refuse(key, error)
                    case Yield():
                        raise AssertionError("there is no batch work here")
        self._pumping = False
        if self._core.queued and not self._ticking:
            self._ticking = True
            self._agenda.after(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self.pump()
