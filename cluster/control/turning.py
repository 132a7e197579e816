"""Changes of role under way: each life is told once, and again later where it did not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Protocol

from cluster.clock import Clock
from cluster.control.reconcile import SlotState, Turn
from cluster.errors import PdserveError

AGAIN_SECONDS = 5.0


class Turning(Protocol):
    """A worker's life."""

    async def set_role(self, role: str, drain_seconds: float) -> int: ...


class Turns:
    """Marks a life while it is being told.

    Args:
        slots: the controller's own, which it marks in.
        drain_seconds: as configured now.
    """

    def __init__(
        self,
        slots: MutableMapping[str, SlotState],
        clock: Clock,
        drain_seconds: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._drain_seconds = drain_seconds
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, life: Turning, turn: Turn) -> None:
        """Has `life` take the role; what comes of it is noted in its slot."""
        self._note(turn, None)
        task = asyncio.create_task(self._turn(life, turn), name=f"turn {turn.slot_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _turn(self, life: Turning, turn: Turn) -> None:
        again = 0.0
        try:
            left = await life.set_role(turn.role, self._drain_seconds())
            print(f"{turn.slot_id}: is {turn.role} now, {left} sequences went on", flush=True)
        except PdserveError as error:
            again = self._clock.now() + AGAIN_SECONDS
            print(f"{turn.slot_id}: did not become {turn.role}: {error}", flush=True)
        finally:
            self._note(turn, again)

    def _note(self, turn: Turn, turns_at: float | None) -> None:
        state = self._slots.get(turn.slot_id)
        if state is None or state.life is None or state.life.incarnation != turn.incarnation:
            return
        self._slots[turn.slot_id] = replace(state, life=replace(state.life, turns_at=turns_at))
