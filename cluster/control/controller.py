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
from cluster.control.fleet import RayLife, drop_former_groups, resource_names, restarted
from cluster.control.launch import Launch
from cluster.control.life_log import redirect_output
from cluster.control.lives import Lives
from cluster.control.plan_loop import PlanLoop, Sight
from cluster.control.reconcile import (
    DropLease,
    GiveUp,
    Kill,
    Observed,
    SlotState,
    Start,
    Stop,
    Turn,
    desired_slots,
    reconcile,
    renewed,
)
from cluster.control.registered import as_registered, as_wanted, leases
from cluster.control.status import ClusterStatus, slot_status
from cluster.control.store_view import StoreView
from cluster.control.turning import Turns
from cluster.errors import Unavailable

INTERVAL_SECONDS = 0.5
TELL_SECONDS = 5.0
"""What a router has to take a configuration over: one that hangs must not hold up the rest."""


class Controller:
    """Body of the controller actor."""

    def __init__(self, launch: Launch, namespace: str) -> None:
        redirect_output(log_path(launch, "controller"))
        self._launch = launch
        self._clock = SystemClock()
        self._desired = desired_slots(launch.config)
        self._slots = {slot.slot_id: SlotState(slot) for slot in self._desired}
        self._lives = Lives(
            self._slots, self._clock, namespace, lambda: self._launch, lambda: self._desired
        )
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
                    self._lives.running.get(slot_id),
                    self._store.members,
                    self._lives.tails.get(slot_id, ()),
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
        running = self._lives.running
        lives = {slot_id: running[slot_id] for slot_id in routers if slot_id in running}
        said = await asyncio.gather(*(_told(name, life, config) for name, life in lives.items()))
        return [complaint for complaint in said if complaint]

    async def leave(self, node_id: str, drain_seconds: float) -> list[str]:
        """Drains and ends what runs on a host that is about to go; nothing starts there again.

        Returns the slots that were on it; each gets its next life on another host.
        """
        self._ensure_running()
        return await self._lives.leave(node_id, drain_seconds)

    async def shutdown(self, drain_seconds: float) -> None:
        """Routers stop taking requests and drain, then the workers end. Returns when all is gone.

        A life that is not ready has nothing to drain and is killed.
        """
        self._stopping = True
        for task in filter(None, (self._loop, self._planning)):
            task.cancel()
            await asyncio.wait([task])  # it may have failed: all the more is to be shut down
        await self._lives.settled()
        deadline = self._clock.now() + drain_seconds
        for kind in ("router", "worker"):
            left = max(0.0, deadline - self._clock.now())
            slots = [state.slot for state in self._slots.values() if state.slot.kind == kind]
            await asyncio.gather(*(self._lives.end(slot, left) for slot in slots))
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
        self._lives.bury_the_dead()
        await self._lives.note_places()
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
                    self._lives.start(slot)
                case Stop(slot_id):
                    self._lives.end_later(self._slots[slot_id].slot)
                case Turn(slot_id):
                    self._turns.start(self._lives.running[slot_id], action)
                case Kill(slot_id, _, reason):
                    await self._lives.kill(slot_id, reason)
                case GiveUp(slot_id, reason):
                    state = self._slots[slot_id]
                    self._slots[slot_id] = replace(state, gave_up=True, reason=reason)
                    print(f"{slot_id}: gave up: {reason}", flush=True)
                case DropLease(lease):
                    with suppress(Unavailable):
                        await self._store.drop(lease)
        await self._store.tell_waiting(self._clock.now(), self._slots, self._lives.running)

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
        return Sight(self._store.plans, self._store.members, self._slots, self._lives.running)

    def _observed(self) -> Observed:
        return Observed(tuple(self._slots.values()), leases(self._store.members))


async def _told(slot_id: str, life: RayLife, config: Config) -> str:
    """As `RayLife.reload`, within `TELL_SECONDS`."""
    try:
        async with asyncio.timeout(TELL_SECONDS):
            return await life.reload(config)
    except TimeoutError:
        return f"{slot_id}: did not answer within {TELL_SECONDS:g} s"
