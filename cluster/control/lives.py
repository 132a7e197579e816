"""The lives in the slots: where each begins, when its host is known, how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import replace

from cluster.clock import Clock
from cluster.control.fleet import End, RayLife, any_gpus, hosts, need_of
from cluster.control.hosts import Placed, avoiding, lacking, preferred
from cluster.control.launch import Launch
from cluster.control.reconcile import Life, Slot, SlotState, ended
from cluster.control.registered import as_placed
from cluster.ids import new_incarnation


class Lives:
    """Starts and ends what `reconcile` asks for, and notes in the slots what came of it.

    Args:
        slots: the controller's own, in which it marks.
        launch: as configured now.
        wanted: the slots that are to be kept, now.

    Attributes:
        running: by slot.
        tails: the last lines of the log of a slot's last life.
    """

    def __init__(
        self,
        slots: MutableMapping[str, SlotState],
        clock: Clock,
        namespace: str,
        launch: Callable[[], Launch],
        wanted: Callable[[], Iterable[Slot]],
    ) -> None:
        self._slots, self._clock, self._namespace = slots, clock, namespace
        self._launch, self._wanted = launch, wanted
        self._leaving: set[str] = set()
        self._stops: set[asyncio.Task[None]] = set()
        self.running: dict[str, RayLife] = {}
        self.tails: dict[str, tuple[str, ...]] = {}

    def start(self, slot: Slot) -> None:
        """A new life, anywhere but on a host that leaves."""
        incarnation = new_incarnation()
        life = Life(incarnation, "starting", self._clock.now())
        self._slots[slot.slot_id] = replace(self._slots[slot.slot_id], life=life)
        known = hosts()
        self._leaving &= {host.node_id for host in known}
        need = avoiding(need_of(slot, any_gpus()), self._leaving)
        placed = [Placed(life.node_id or life.aim, life.need) for life in self.running.values()]
        aim = preferred(need, known, placed)
        self.running[slot.slot_id] = RayLife(
            self._launch(), slot, incarnation, self._namespace, need, aim
        )
        print(f"{slot.slot_id}: life {incarnation} starts", flush=True)

    def bury_the_dead(self) -> None:
        """Notes which lives have ended by themselves."""
        for slot_id, life in list(self.running.items()):
            if life.ended.done() and not self._is_stopping(slot_id):
                self._bury(slot_id, life.ended.result())

    async def note_places(self) -> None:
        """Which lives have got their host, and what keeps the others from getting one."""
        waiting = {slot_id: life for slot_id, life in self.running.items() if not life.node_id}
        placed = {slot_id for slot_id, life in self.running.items() if life.node_id}
        self._slots.update(as_placed(self._clock.now(), self._slots, placed))
        known = hosts() if waiting else []
        for slot_id, running in waiting.items():
            lacks = lacking(running.need, known)
            if lacks != running.lacks:
                print(f"{slot_id}: {lacks or 'waits for room'}", flush=True)
            running.lacks = lacks
            if lacks and self._launch().embedded:  # no other host will ever join
                await running.kill()
                self._bury(slot_id, End(lacks, permanent=True))

    async def kill(self, slot_id: str, reason: str) -> None:
        """At once."""
        await self.running[slot_id].kill()
        self._bury(slot_id, End(reason))

    async def leave(self, node_id: str, drain_seconds: float) -> list[str]:
        """Drains and ends what runs on a host, and starts nothing there again; what it was."""
        self._leaving.add(node_id)
        there = [slot_id for slot_id, life in self.running.items() if life.node_id == node_id]
        # Those that still wait for a host would be free to take this one: they ask anew.
        waiting = [slot_id for slot_id, life in self.running.items() if not life.node_id]
        print(f"host {node_id[:8]} leaves: {there}", flush=True)
        ends = (self.end(self._slots[slot_id].slot, drain_seconds) for slot_id in there + waiting)
        await asyncio.gather(*ends)
        return there

    async def end(self, slot: Slot, drain_seconds: float) -> None:
        """Drains and ends the slot's life; one that is not ready has nothing to drain."""
        state, running = self._slots[slot.slot_id], self.running.get(slot.slot_id)
        if running is None or state.life is None:
            return
        was_ready = state.life.phase == "ready"
        self._slots[slot.slot_id] = replace(state, life=replace(state.life, phase="stopping"))
        await (running.stop(drain_seconds) if was_ready else running.kill())
        self.running.pop(slot.slot_id, None)
        if slot.slot_id in {wanted.slot_id for wanted in self._wanted()}:
            self._slots[slot.slot_id] = SlotState(slot)
        else:
            self._slots.pop(slot.slot_id, None)

    def end_later(self, slot: Slot) -> None:
        """As `end`, with the configured drain; returns at once."""
        drain = self._launch().config.lifecycle.drain_timeout_seconds
        task = asyncio.create_task(self.end(slot, drain))
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)

    async def settled(self) -> None:
        """Returns when all that `end_later` began is done."""
        await asyncio.gather(*self._stops)

    def _bury(self, slot_id: str, end: End) -> None:
        del self.running[slot_id]
        self.tails[slot_id] = end.log_tail
        state = self._slots[slot_id]
        self._slots[slot_id] = ended(state, self._clock.now(), end.reason, end.permanent)
        print(f"{slot_id}: life ended: {end.reason}", flush=True)

    def _is_stopping(self, slot_id: str) -> bool:
        life = self._slots[slot_id].life
        return life is not None and life.phase == "stopping"
