"""The controller: one named Ray actor that keeps the wanted lives alive.

It owns the actors: when it dies Ray ends them with it, restarts it, and it starts all anew. Its
loop begins with the first call; a restarted controller's once `pdserve up` has told it the
configuration, which may have been reloaded since the one that Ray starts it with.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import replace

from cluster.clock import SystemClock
from cluster.config import Config
from cluster.control.actors import log_path
from cluster.control.desk import PlanDesk
from cluster.control.fleet import (
    End,
    RayLife,
    any_gpus,
    drop_former_groups,
    hosts,
    need_of,
    resource_names,
    restarted,
)
from cluster.control.hosts import Placed, avoiding, lacking, preferred
from cluster.control.launch import Launch
from cluster.control.life_log import redirect_output
from cluster.control.plan_loop import PlanLoop, Sight
from cluster.control.reconcile import (
    DropLease,
    GiveUp,
    Kill,
    Life,
    Observed,
    Slot,
    SlotState,
    Start,
    Stop,
    Turn,
    desired_slots,
    ended,
    reconcile,
    renewed,
)
from cluster.control.registered import as_placed, as_registered, as_wanted, leases
from cluster.control.status import ClusterStatus, slot_status
from cluster.control.store_view import StoreView
from cluster.control.turning import Turns
from cluster.errors import Unavailable
from cluster.ids import new_incarnation

INTERVAL_SECONDS = 0.5


class Controller:
    """Body of the controller actor."""

    def __init__(self, launch: Launch, namespace: str) -> None:
        redirect_output(log_path(launch, "controller"))
        self._launch, self._namespace = launch, namespace
        self._clock = SystemClock()
        self._desired = desired_slots(launch.config)
        self._slots = {slot.slot_id: SlotState(slot) for slot in self._desired}
        self._lives: dict[str, RayLife] = {}
        self._tails: dict[str, tuple[str, ...]] = {}
        self._leaving: set[str] = set()
        self._stops: set[asyncio.Task[None]] = set()
        self._store = StoreView(launch.store_url, lambda: self._launch.config)
        self._desk = PlanDesk(launch.config)
        self._turns = Turns(
            self._slots, self._clock, lambda: self._launch.config.planner.flip_drain_seconds
        )
        self._plan_loop = PlanLoop(self._desk, self._clock, self._sight, resource_names)
        self._loop: asyncio.Task[None] | None = None
        self._planning: asyncio.Task[None] | None = None
        self._steering, self._stopping = asyncio.Lock(), False
        self._needs_config = restarted()
        drop_former_groups(launch.config.name)

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    async def status(self) -> ClusterStatus:
        """Every slot as it is now."""
        self._ensure_running()
        now = self._clock.now()
        return ClusterStatus(
            store_reachable=self._store.members is not None,
            stopping=self._stopping,
            slots=tuple(
                slot_status(
                    now,
                    state,
                    self._lives.get(slot_id),
                    self._store.members,
                    self._tails.get(slot_id, ()),
                )
                for slot_id, state in sorted(self._slots.items())
            ),
            needs_config=self._needs_config,
        )

    async def reload(self, config: Config) -> list[str]:
        """Takes over pool sizes and timeouts, and tells the routers of the rest; what a router
        could not take over.

        `config` differs from the one before in fields of `config_changes.LIVE` only. Slots that had
        been given up get another try.
        """
        self._needs_config = False
        self._desk.reload(config)
        self._desired = self._desk.slots() if self._desk.ready else desired_slots(config)
        self._know(renewed(self._slots, self._desired))
        print("the configuration was reloaded", flush=True)
        with suppress(Unavailable):
            await self._steer()  # so that whoever asks next sees what is wanted now
        return await self._tell_routers()

    async def _tell_routers(self) -> list[str]:
        """The configuration, with the targets that a person has set, goes to all of them."""
        config = self._desk.config
        self._launch = replace(self._launch, config=config)
        routers = (s.slot.slot_id for s in self._slots.values() if s.slot.kind == "router")
        lives = [self._lives[slot_id] for slot_id in routers if slot_id in self._lives]
        said = await asyncio.gather(*(life.reload(config) for life in lives))
        return [complaint for complaint in said if complaint]

    async def leave(self, node_id: str, drain_seconds: float) -> list[str]:
        """Drains and ends what runs on a host that is about to go; nothing starts there again.

        Returns the slots that were on it; each gets its next life on another host.
        """
        self._ensure_running()
        self._leaving.add(node_id)
        there = [slot_id for slot_id, life in self._lives.items() if life.node_id == node_id]
        # Those that still wait for a host would be free to take this one: they ask anew.
        waiting = [slot_id for slot_id, life in self._lives.items() if not life.node_id]
        print(f"host {node_id[:8]} leaves: {there}", flush=True)
        ends = (self._end(self._slots[slot_id].slot, drain_seconds) for slot_id in there + waiting)
        await asyncio.gather(*ends)
        return there

    async def shutdown(self, drain_seconds: float) -> None:
        """Routers stop taking requests and drain, then the workers end. Returns when all is gone.

        A life that is not ready has nothing to drain and is killed.
        """
        self._stopping = True
        for task in filter(None, (self._loop, self._planning)):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await asyncio.gather(*self._stops)
        deadline = self._clock.now() + drain_seconds
        for kind in ("router", "worker"):
            left = max(0.0, deadline - self._clock.now())
            slots = [state.slot for state in self._slots.values() if state.slot.kind == kind]
            await asyncio.gather(*(self._end(slot, left) for slot in slots))
        if self._store.known:
            with suppress(Unavailable):
                await self._observe()
                for action in reconcile(self._clock.now(), (), self._observed()):
                    if isinstance(action, DropLease):
                        await self._store.drop(action.lease)

    def _ensure_running(self) -> None:
        if self._stopping or self._needs_config:
            return
        if self._loop is None or self._loop.done():
            if self._loop is not None and not self._loop.cancelled():
                print(f"the loop failed and goes on: {self._loop.exception()!r}", flush=True)
            self._loop = asyncio.create_task(self._run(), name="reconcile")
        if self._planning is None:
            self._planning = asyncio.create_task(self._plan_loop.run(), name="planning")

    async def _run(self) -> None:
        while True:
            await self._step()
            await asyncio.sleep(INTERVAL_SECONDS)

    async def _step(self) -> None:
        for slot_id, life in list(self._lives.items()):
            if life.ended.done() and not self._is_stopping(slot_id):
                self._bury(slot_id, life.ended.result())
        await self._note_places()
        with suppress(Unavailable):
            await self._observe()
            await self._steer()
        if not self._desk.ready:
            return  # what people have set is not known yet, and no worker could register
        actions = reconcile(
            self._clock.now(),
            self._desired,
            self._observed(),
            self._launch.config.lifecycle.start_timeout_seconds,
        )
        for action in actions:
            match action:
                case Start(slot):
                    self._start(slot)
                case Stop(slot_id):
                    self._later(self._slots[slot_id].slot)
                case Turn(slot_id):
                    self._turns.start(self._lives[slot_id], action)
                case Kill(slot_id, _, reason):
                    await self._lives[slot_id].kill()
                    self._bury(slot_id, End(reason))
                case GiveUp(slot_id, reason):
                    state = self._slots[slot_id]
                    self._slots[slot_id] = replace(state, gave_up=True, reason=reason)
                    print(f"{slot_id}: gave up: {reason}", flush=True)
                case DropLease(lease):
                    with suppress(Unavailable):
                        await self._store.drop(lease)
        await self._store.tell_waiting(self._clock.now(), self._slots, self._lives)

    async def _note_places(self) -> None:
        """Which lives have got their host, and what keeps the others from getting one."""
        waiting = {slot_id: life for slot_id, life in self._lives.items() if not life.node_id}
        placed = {slot_id for slot_id, life in self._lives.items() if life.node_id}
        self._slots |= as_placed(self._clock.now(), self._slots, placed)
        known = hosts() if waiting else []
        for slot_id, running in waiting.items():
            lacks = lacking(running.need, known)
            if lacks != running.lacks:
                print(f"{slot_id}: {lacks or 'waits for room'}", flush=True)
            running.lacks = lacks
            if lacks and self._launch.embedded:  # no other host will ever join
                await running.kill()
                self._bury(slot_id, End(lacks, permanent=True))

    async def _observe(self) -> None:
        """Reads the registry; a life is ready once its own record says so."""
        members = await self._store.read()
        self._slots |= as_registered(self._clock.now(), self._slots, members)

    async def _steer(self) -> None:
        """What people have asked for since, one step of what is set, and the slots for that."""
        desk, plans = self._desk, self._store.plans
        if plans is None:
            return
        async with self._steering:
            orders = await desk.steer(plans, self._clock.now(), self._slots.values())
            self._desired = desk.slots()
            self._know(as_wanted(self._slots, self._desired))
        if desk.config != self._launch.config:
            await self._tell_routers()
        if orders and self._store.members is not None:
            await desk.publish(plans, self._store.members.workers)

    def _know(self, slots: dict[str, SlotState]) -> None:
        self._slots.clear()  # in place: others mark in it
        self._slots.update(slots)

    def _sight(self) -> Sight:
        return Sight(self._store.plans, self._store.members, self._slots, self._lives)

    def _observed(self) -> Observed:
        return Observed(tuple(self._slots.values()), leases(self._store.members))

    def _start(self, slot: Slot) -> None:
        incarnation = new_incarnation()
        life = Life(incarnation, "starting", self._clock.now())
        self._slots[slot.slot_id] = replace(self._slots[slot.slot_id], life=life)
        known = hosts()
        self._leaving &= {host.node_id for host in known}
        need = avoiding(need_of(slot, any_gpus()), self._leaving)
        placed = [Placed(life.node_id or life.aim, life.need) for life in self._lives.values()]
        aim = preferred(need, known, placed)
        self._lives[slot.slot_id] = RayLife(
            self._launch, slot, incarnation, self._namespace, need, aim
        )
        print(f"{slot.slot_id}: life {incarnation} starts", flush=True)

    def _bury(self, slot_id: str, end: End) -> None:
        del self._lives[slot_id]
        self._tails[slot_id] = end.log_tail
        state = self._slots[slot_id]
        self._slots[slot_id] = ended(state, self._clock.now(), end.reason, end.permanent)
        print(f"{slot_id}: life ended: {end.reason}", flush=True)

    def _later(self, slot: Slot) -> None:
        drain = self._launch.config.lifecycle.drain_timeout_seconds
        task = asyncio.create_task(self._end(slot, drain))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def _end(self, slot: Slot, drain_seconds: float) -> None:
        state, running = self._slots[slot.slot_id], self._lives.get(slot.slot_id)
        if running is None or state.life is None:
            return
        was_ready = state.life.phase == "ready"
        self._slots[slot.slot_id] = replace(state, life=replace(state.life, phase="stopping"))
        await (running.stop(drain_seconds) if was_ready else running.kill())
        self._lives.pop(slot.slot_id, None)
        if slot.slot_id in {wanted.slot_id for wanted in self._desired}:
            self._slots[slot.slot_id] = SlotState(slot)
        else:
            self._slots.pop(slot.slot_id, None)

    def _is_stopping(self, slot_id: str) -> bool:
        life = self._slots[slot_id].life
        return life is not None and life.phase == "stopping"
