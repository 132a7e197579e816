"""The planner's desk in the controller: keeps the state, takes orders, lets each model's planner
decide, and carries out what was decided – on the wanted slots; `reconcile` does the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping, Sequence

from cluster.config import Config
from cluster.control.model_planner import ModelPlanner, numbers, targets_of
from cluster.control.orders import obeyed
from cluster.control.reconcile import Slot, SlotState
from cluster.control.seen import seen_workers
from cluster.control.speeds import speed_of, with_capacity
from cluster.control.traffic import Look, TrafficBook
from cluster.control.wanted import (
    carried_out,
    counts_of,
    reloaded,
    restored,
    settling,
    slots_of,
)
from cluster.errors import PdserveError, Unavailable, status_of
from cluster.planner.actions import counted, serving
from cluster.planner.state import Counts, Decision, WorkerSeen
from cluster.store.plan_records import (
    ActionRecord,
    DecisionRecord,
    ModelPlan,
    Order,
    PlanState,
    PlanView,
    Reply,
    ShortfallRecord,
)
from cluster.store.plans import Plans
from cluster.store.records import WorkerRecord

LOG_SECONDS = 60.0
"""A decision like the one before it is logged this often."""


class PlanDesk:
    """Owns the numbers of workers. All methods in one event loop.

    Args:
        config: the configuration as it was loaded, without what people have set since.
    """

    def __init__(self, config: Config) -> None:
        self._given = config
        self._state: PlanState | None = None
        self._kept: PlanState | None = None
        self._planners: dict[str, ModelPlanner] = {}
        self._unplanned: dict[str, str] = {}
        self._decisions: dict[str, DecisionRecord] = {}
        self._logged: dict[str, tuple[float, tuple[object, ...]]] = {}
        self._number = time.time_ns() // 1_000_000  # ascending through restarts
        self.book = TrafficBook()

    @property
    def ready(self) -> bool:
        """The state was read: before that nothing may be started."""
        return self._state is not None

    @property
    def state(self) -> PlanState:
        """Only once it is ready."""
        assert self._state is not None
        return self._state

    @property
    def config(self) -> Config:
        """With the targets that a person has set."""
        targets = self._state.targets if self._state is not None else {}
        if not targets:
            return self._given
        changed = {
            name: getattr(self._given.classes, name).model_copy(update=dict(seconds))
            for name, seconds in targets.items()
        }
        classes = self._given.classes.model_copy(update=changed)
        return self._given.model_copy(update={"classes": classes})

    async def load(self, plans: Plans) -> None:
        """Goes on from what the store has. Raises Unavailable while it is out."""
        self._state = restored(self._given, await plans.state())

    def reload(self, config: Config) -> None:
        """Another configuration."""
        if config.planner != self._given.planner:
            self._planners, self._unplanned = {}, {}
        self._given = config
        if self._state is not None:
            self._state = reloaded(config, self._state)

    def slots(self) -> tuple[Slot, ...]:
        """What is wanted now."""
        return slots_of(self._given, self.state)

    async def keep(self, plans: Plans) -> None:
        """Writes the state where it has changed. Raises Unavailable."""
        if self._state is not None and self._state is not self._kept:
            state = self._state
            await plans.keep_state(state)
            self._kept = state

    async def steer(self, plans: Plans, now: float, slots: Collection[SlotState]) -> list[Order]:
        """Reads the state if need be, takes orders, goes one step towards what is set, and keeps
        the state; the orders that were carried out. Raises Unavailable: the store is out."""
        if not self.ready:
            await self.load(plans)
        orders = await self.take_orders(plans)
        await self.settle(plans, seen_workers(now, self.config, self.state, list(slots)))
        await self.keep(plans)
        return orders

    # --- people ---------------------------------------------------------------------------------

    async def take_orders(self, plans: Plans) -> list[Order]:
        """Carries out what operators have asked for since, and answers; what was carried out.

        Raises:
            Unavailable: the store is out.
        """
        carried: list[Order] = []
        while (taken := await plans.next_order()) is not None:
            mark, order = taken
            try:
                self._state, said = obeyed(self._given, self.state, order)
                await self.keep(plans)
                carried.append(order)
                reply = Reply(said)
                print(f"by hand: {said}", flush=True)
            except Unavailable:
                raise
            except PdserveError as error:
                reply = Reply(error.message, status_of(error).grpc_code)
            await plans.answer(mark, reply)
        return carried

    async def settle(self, plans: Plans, seen: Mapping[str, Sequence[WorkerSeen]]) -> None:
        """One step towards what people and the configuration say."""
        for model in self._given.models:
            workers = seen[model.name]
            if actions := settling(self._given, self.state, model, workers):
                have = counts_of(self.state, model.name)
                self._state, records = carried_out(self.state, model.name, actions)
                after = numbers(counts_of(self.state, model.name))
                record = DecisionRecord(
                    self._next_number(),
                    time.time(),
                    model.name,
                    "operator",
                    True,
                    numbers(have),
                    after,
                    after,
                    records,
                    reasons=(f"set by hand or by the configuration: {self._spoken(model.name)}",),
                )
                print(f"{model.name}: {', '.join(map(str, records))}", flush=True)
                await plans.log(record)

    # --- planning -------------------------------------------------------------------------------

    async def plan(
        self,
        now: float,
        plans: Plans,
        seen: Mapping[str, Sequence[WorkerSeen]],
        look: Look | None,
        resources: Iterable[str],
        records: Sequence[WorkerRecord],
    ) -> None:
        """One decision for each model, carried out if the planner is to act. Raises Unavailable."""
        mode = self._given.planner.mode
        expected = self.state  # what `seen` is of: what a person has set since comes first
        for model in self._given.models:
            name = model.name
            if mode == "off":
                self._decisions.pop(name, None)
                continue
            planner = self._planner(name, resources, records)
            if planner is None:
                have = counted(serving(seen[name]))
                held = Decision(now, have, have, held=self._unplanned[name])
                await self._note(plans, name, have, held, (), acted=False)
                continue
            if look is not None:
                planner.learn(look.steps)
            # Numbers take a while at a thousand workers; the loop goes on meanwhile.
            decision = await asyncio.to_thread(
                planner.decide, now, self.config, expected, seen[name], look
            )
            acts = mode == "act" and self.state is expected
            state, actions = carried_out(self.state, name, decision.actions)
            if acts and actions:
                self._state = expected = state
            await self._note(plans, name, counted(serving(seen[name])), decision, actions, acts)
        await plans.publish(self._view(records))

    def _planner(
        self, name: str, resources: Iterable[str], records: Sequence[WorkerRecord]
    ) -> ModelPlanner | None:
        if name in self._planners:
            return self._planners[name]
        mine = [r for r in records if r.model == name and r.num_blocks]
        if not mine:
            self._unplanned[name] = "no worker is ready yet"
            return None
        model = self._given.model(name)
        try:
            speed = speed_of(self._given, model, resources)
        except PdserveError as error:
            self._unplanned[name] = error.message
            return None
        kv_tokens = min(r.num_blocks * r.block_size for r in mine)
        self._planners[name] = ModelPlanner(self.config, model, with_capacity(speed, kv_tokens))
        return self._planners[name]

    async def _note(
        self,
        plans: Plans,
        name: str,
        have: Counts,
        decision: Decision,
        actions: tuple[ActionRecord, ...],
        acted: bool,
    ) -> None:
        """Keeps a decision; logs it where it says more than the one before it."""
        record = DecisionRecord(
            self._next_number(),
            time.time(),
            name,
            "planner",
            acted,
            numbers(have),
            numbers(decision.target),
            numbers(decision.needed),
            actions,
            decision.held,
            decision.reasons,
            tuple(
                ShortfallRecord(s.kind, s.metric, s.target, s.predicted, s.excess)
                for s in decision.shortfalls
            ),
            dict(decision.inputs),
        )
        self._decisions[name] = record
        short = tuple((s.kind, s.metric) for s in record.shortfalls)
        gist = (tuple(record.target.items()), tuple(record.needed.items()), decision.held, short)
        at, last = self._logged.get(name, (0.0, ()))
        if (acted and actions) or gist != last or record.at - at >= LOG_SECONDS:
            self._logged[name] = record.at, gist
            await plans.log(record)
        if acted and actions:
            print(f"{name}: {', '.join(map(str, actions))}", flush=True)

    def _view(self, records: Sequence[WorkerRecord]) -> PlanView:
        state = self.state
        models = []
        for model in self._given.models:
            name = model.name
            ready = [r.role for r in records if r.model == name and r.state == "ready"]
            planner = self._planners.get(name)
            targets = targets_of(self.config)
            models.append(
                ModelPlan(
                    name,
                    {role: ready.count(role) for role in sorted(set(ready))},
                    numbers(counts_of(state, name)),
                    state.manual.get(name, {}),
                    tuple(w.worker_id for w in state.workers if w.drained and w.model == name),
                    {k: {"ttft_seconds": t.ttft, "tpot_seconds": t.tpot, "share": t.share}
                     for k, t in targets.items()},
                    self.book.attainment(name),
                    planner.errors if planner else {},
                    state.done.get(name, {}),
                    planner.label if planner else "",
                    self._decisions.get(name),
                )
            )  # fmt: skip
        return PlanView(time.time(), self._given.planner.mode, tuple(models))

    async def publish(self, plans: Plans, records: Sequence[WorkerRecord]) -> None:
        """The plan as it is now, for GetPlan. Raises Unavailable."""
        await plans.publish(self._view(records))

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _spoken(self, model: str) -> str:
        held, base = self.state.manual.get(model, {}), self.state.base.get(model, {})
        parts = [f"{n} {role} by hand" for role, n in held.items()]
        parts += [f"{n} {role} configured" for role, n in base.items() if role not in held]
        return ", ".join(parts)
