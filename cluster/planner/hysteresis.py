"""What keeps the planner steady: growth at once, loans after moments, shrinking after long."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.planner.actions import Wish
from cluster.planner.state import (
    NOT_NEEDED,
    ROLES,
    Action,
    Add,
    Counts,
    Policy,
    Remove,
    Role,
)

LEND_STEPS = 6
"""A pool lends to another what it did not need over so many decisions."""
MAX_DAMPING = 8.0
"""`down_after` grows to so many times itself at most."""


@dataclass(frozen=True)
class _Needs:
    """What one moment needed, kept for the hysteresis.

    Attributes:
        feared: for the forecast at its highest, and the backlog.
        measured: it is a need, and not what merely was there at first.
        strange: nothing says yet whether it is too many.
    """

    at: float
    feared: Counts
    measured: bool = True
    strange: bool = False

    def excess(self, come: Counts) -> int:
        """Workers by which it is more than what has come; at least one."""
        return 1 if self.strange else max(1, self.feared.total - come.total)


class Hysteresis:
    """Remembers what was needed, and how it went when less was kept."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._needs: deque[_Needs] = deque()
        self._conversion: Counts | None = None
        self._strange = True
        self._shrunk_at = -math.inf
        self._damping = 1.0

    @property
    def patience(self) -> float:
        """Seconds for which what was needed is kept; not less than workers take to start."""
        policy = self.policy
        return self._damping * max(policy.down_after, 1.5 * policy.cold_start)

    def forget(self) -> None:
        """What was needed says nothing any more: of other targets, another clock."""
        self._needs.clear()
        self._conversion = None
        self._strange = True

    def turn(self) -> None:
        """The mode changes: what is needed in it is told by what has come, as before."""
        self._needs.clear()
        self._conversion = None

    def wish(
        self,
        now: float,
        needed: Counts,
        come: Counts,
        have: Counts,
        manual: Mapping[Role, int],
        may_add: bool,
        reasons: list[str],
    ) -> Wish:
        """Growth at once, loans after moments, shrinking after `patience`.

        Workers are raised for what is feared and kept for what has `come` within the patience, as
        it is told now. A fear that did not come true, or a need that a fall has ended, is provided
        for the longer the less that costs: one worker too many for `down_after`, k for its k-th
        part, so that none costs more worker-seconds than another; but what was started is waited
        for before it is judged.

        Two pools that were large one after the other are not both kept at their largest: what was
        needed of late decides about each, and all together are as many as any one moment needed.
        """
        policy = self.policy
        if not self._needs:
            first = _converted(have, needed)
            self._needs.append(_Needs(now, first, measured=False, strange=self._strange))
            self._strange = False
        self._needs.append(_Needs(now, needed))
        soon, late = self._damping * 1.5 * policy.cold_start, self.patience
        while self._needs[0].at < now - late:
            self._needs.popleft()
        keep, lend, total = _largest(needed, come), needed, max(needed.total, come.total)
        for each in self._needs:
            if each.at >= now - max(soon, late / each.excess(come)):
                keep, total = _largest(keep, each.feared), max(total, each.feared.total)
            if each.measured and each.at > now - LEND_STEPS * policy.interval:
                lend = _largest(lend, each.feared)
        limit = min(total, policy.max_workers)
        if keep.total > limit:
            keep = lend if lend.total <= limit else needed
            keep = _filled(keep, have, limit)
        # Until every worker has a role of this mode, all of them are wanted in it; but for those
        # that a person wants in another one.
        for role, workers in manual.items():
            if (role == "both") != _mode(needed):
                have = replace(have, **{role: max(0, have.of(role) - workers)})
        other = have.prefill or have.decode if _mode(needed) else have.both
        # The roles that they get are settled once: needs that waver meanwhile would have one turned
        # to a pool that has no use for it when it arrives.
        if not other:
            self._conversion = None
        elif self._conversion is None or self._conversion.total != have.total:
            self._conversion = _converted(have, needed)
        want = _largest(needed, self._conversion) if self._conversion else needed
        keep = _largest(keep, want) if other else keep
        for role, workers in manual.items():
            reasons.append(f"{role} is held at {workers} by hand until it is released")
            want, keep = replace(want, **{role: workers}), replace(keep, **{role: workers})
        # Where the budget has no room for both, a person's number goes before the planner's.
        for role in ROLES:
            over = want.total - policy.max_workers
            if manual and over > 0 and role not in manual and want.of(role) > policy.minimum:
                fits = max(policy.minimum, want.of(role) - over)
                want, lend, keep = (
                    replace(each, **{role: min(fits, each.of(role))}) for each in (want, lend, keep)
                )
        if keep != want:
            reasons.append(f"not below {keep}, which was needed within {late:g} s")
        return Wish(want, lend, keep, frozenset(manual), may_add)

    def acted(self, now: float, actions: Sequence[Action]) -> None:
        """Growth soon after shrinking: the shrinking was wrong, and the next one waits longer."""
        calm = 4 * self.policy.down_after * self._damping
        if any(isinstance(action, Add) for action in actions):
            if now - self._shrunk_at < calm:
                self._damping = min(MAX_DAMPING, 2 * self._damping)
                self._shrunk_at = -math.inf
        elif any(isinstance(a, Remove) and a.reason == NOT_NEEDED for a in actions):
            if now - self._shrunk_at > calm:
                self._damping = max(1.0, self._damping / 2)
            self._shrunk_at = now


def _converted(have: Counts, needed: Counts) -> Counts:
    """All the workers that are there, in this mode: at first nothing says that they are too
    many, and a change of mode is no reason to end any."""
    if _mode(needed):
        return Counts(both=max(have.total, needed.both))
    if not have.both:
        return have
    spare = max(0, have.total - needed.total)
    prefill = needed.prefill + round(spare * needed.prefill / max(1, needed.total))
    return Counts(prefill=prefill, decode=max(needed.decode, have.total - prefill))


def _filled(counts: Counts, have: Counts, total: int) -> Counts:
    """`counts`, with what is there more than that until it is `total`."""
    for role in ROLES:
        more = min(total - counts.total, have.of(role) - counts.of(role))
        if more > 0:
            counts = replace(counts, **{role: counts.of(role) + more})
    return counts


def _largest(one: Counts, other: Counts) -> Counts:
    return Counts(*(max(one.of(role), other.of(role)) for role in ROLES))


def _mode(counts: Counts) -> bool:
    """Whether these are aggregated workers only."""
    return counts.both > 0 and not (counts.prefill or counts.decode)
