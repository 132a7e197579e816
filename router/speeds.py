"""What workers are expected to take, learned from what they took: three curves a worker. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from router.curves import Curves
from router.placement import WorkerView

FADE_EVERY_SECONDS = 1.0


class Speeds:
    """Curves by slot, which start from a guess: an 8B model on a current GPU.

    Attributes:
        prefill: seconds to compute so many prompt tokens.
        step: seconds of a decode step of so many sequences.
        exposed: seconds that moving so many tokens' KV delays the second token.
    """

    def __init__(self) -> None:
        self.prefill = Curves(4, 15, lambda tokens: 4e-3 + 2.5e-5 * tokens)
        self.step = Curves(0, 11, lambda batch: 5e-3 + 6e-5 * batch)
        self.exposed = Curves(4, 15, lambda tokens: 1e-3 + 1e-6 * tokens)
        self._all = (self.prefill, self.step, self.exposed)
        self._faded_at = 0.0

    def resize(self, slots: int) -> None:
        """More slots."""
        for curves in self._all:
            curves.resize(slots)

    def join(self, slot: int, same: list[int]) -> None:
        """A new life, taken to be as those of the same model until it is seen."""
        for curves in self._all:
            curves.reset(slot, same)

    def change_role(self, slot: int, same: list[int]) -> None:
        """What its new role takes, others of the model may know."""
        for curves in self._all:
            curves.adopt(slot, same)

    def fade(self, now: float, views: Iterable[WorkerView | None]) -> list[int]:
        """What is known of those that have had nothing to do grows old, once a second in which
        there are requests, and what was never seen of a worker is taken to be as on the others of
        its model; returns the slots that may have changed."""
        if now - self._faded_at < FADE_EVERY_SECONDS:
            return []
        self._faded_at = now
        peers: dict[tuple[str, str], list[int]] = {}
        same: dict[str, list[int]] = {}
        for slot, view in enumerate(views):
            if view is not None:
                peers.setdefault((view.model, view.role), []).append(slot)
                same.setdefault(view.model, []).append(slot)
        for slots in peers.values():
            for curves in self._all:
                curves.fade(FADE_EVERY_SECONDS, np.array(slots))
        for slots in same.values():
            for curves in self._all:
                curves.follow(np.array(slots))
        return [slot for slots in same.values() for slot in slots]
