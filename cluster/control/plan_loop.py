"""The planner's rhythm: look at the routers, decide, carry out, publish. A failure of it leaves the
lives as they are."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.clock import Clock
from cluster.control.desk import PlanDesk
from cluster.control.reconcile import SlotState
from cluster.control.seen import seen_workers
from cluster.control.traffic import Life, Look
from cluster.errors import Unavailable
from cluster.store.plans import Plans
from cluster.store.registry import Members
from router.demand import DemandReport

LOOK_SECONDS = 2.0


class Asked(Protocol):
    """A running life that can be asked for its demand."""

    async def demand(self, mark: tuple[int, int] | None) -> DemandReport | None: ...


@dataclass(frozen=True)
class Sight:
    """The controller's view at one moment; `members` is None while the store is out."""

    plans: Plans | None
    members: Members | None
    slots: Mapping[str, SlotState]
    lives: Mapping[str, Asked]


class PlanLoop:
    """Runs until cancelled.

    Args:
        sight: the controller's view, now.
        resources: names of the Ray cluster's resources.
    """

    def __init__(
        self,
        desk: PlanDesk,
        clock: Clock,
        sight: Callable[[], Sight],
        resources: Callable[[], list[str]],
    ) -> None:
        self._desk = desk
        self._clock = clock
        self._sight = sight
        self._resources = resources

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._desk.config.planner.interval_seconds)
            try:
                await self.once()
            except Unavailable:
                pass  # the store is out: the workers stay as they are
            except Exception:
                traceback.print_exc()

    async def once(self) -> None:
        """One decision for each model. Raises Unavailable: the store is out."""
        desk, sight = self._desk, self._sight()
        if not desk.ready or sight.plans is None or sight.members is None:
            return
        if desk.config.planner.mode == "off":
            await desk.publish(sight.plans, sight.members.workers)
            return
        look = await self._look(sight)
        sight = self._sight()
        if sight.plans is None or sight.members is None:
            return
        seen = seen_workers(self._clock.now(), desk.config, desk.state, list(sight.slots.values()))
        resources = self._resources()
        records = sight.members.workers
        await desk.plan(self._clock.now(), sight.plans, seen, look, resources, records)
        await desk.keep(sight.plans)

    async def _look(self, sight: Sight) -> Look | None:
        """None unless every ready router has answered: a part of the load is not the load."""
        routers: dict[Life, Asked] = {}
        for slot_id, state in sight.slots.items():
            life = state.life
            if state.slot.kind == "router" and life is not None and life.phase == "ready":
                if (running := sight.lives.get(slot_id)) is None:
                    return None
                routers[slot_id, life.incarnation] = running
        if not routers:
            return None
        book = self._desk.book
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                answers = await asyncio.gather(
                    *(running.demand(book.mark(life)) for life, running in routers.items())
                )
        except TimeoutError:
            return None
        reports: dict[Life, DemandReport] = {}
        for router, answer in zip(routers, answers, strict=True):
            if answer is None:
                return None
            reports[router] = answer
        return book.look(self._clock.now(), reports)
