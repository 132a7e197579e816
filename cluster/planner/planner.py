"""The planner: from what is seen to what is to be done, and why. Pure: `step(now, observed)`.

    forecast ─► demand at the horizon ─► sizing (split, aggregated) ─► hysteresis ─► actions

It plans for what its share of the latest requests would have needed, for the highest rate until a
worker started now would serve, plus the forecast's own error, and for the backlog; it prefers the
fewer workers, and not to disaggregate where that serves the targets as well.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from cluster.planner.actions import Wish, after, counted, plan_actions, serving
from cluster.planner.capacity import Load
from cluster.planner.forecast import Forecast, Holt
from cluster.planner.hysteresis import Hysteresis
from cluster.planner.outlook import Outlook
from cluster.planner.performance import Performance
from cluster.planner.reasons import inputs_of, spoken_load, spoken_shortfall
from cluster.planner.sharing import NOTHING, Beside
from cluster.planner.sizing import Sizing, better, shortfalls, size_split, size_whole
from cluster.planner.state import (
    ClassTargets,
    Counts,
    Decision,
    Observed,
    Policy,
    Remove,
    Role,
    WorkerSeen,
)

JUMP_INTERVALS = 20.0
"""A clock that moved on by more intervals than this between two steps has jumped."""
MODE_STEPS = 12
"""Over so many decisions another mode must be better before it is taken."""
LEAN_STEPS = 6
"""In an overload a pool must have been too small over so many decisions before it is given more."""


class Planner:
    """One model's planner.

    Args:
        performance: of one worker; see `use` for a newer one.
        targets: by class; traffic of a class without targets takes those of "".
        forecast: makes a class's forecast.
    """

    def __init__(
        self,
        policy: Policy,
        performance: Performance,
        targets: Mapping[str, ClassTargets],
        forecast: Callable[[], Forecast] = Holt,
        chunk: int = 2048,
    ) -> None:
        self._steady = Hysteresis(policy)
        self._performance = performance
        self._targets = dict(targets)
        self._outlook = Outlook(forecast)
        self._chunk = chunk
        self._last: float | None = None
        self._whole: bool | None = None
        self._modes: deque[tuple[Sizing, Sizing]] = deque(maxlen=MODE_STEPS)
        self._leaning: deque[int] = deque(maxlen=LEAN_STEPS)
        self._manual: dict[Role, int] = {}
        self._no_new_until = -math.inf
        self._beside = NOTHING

    @property
    def beside(self) -> Beside:
        """What the workers there had beside them on their cores, at the last decision."""
        return self._beside

    @property
    def policy(self) -> Policy:
        return self._steady.policy

    def set_policy(self, policy: Policy) -> None:
        """Another budget or rhythm from now on."""
        self._steady.policy = policy

    def use(self, performance: Performance) -> None:
        """The workers' speed as it was measured of late."""
        self._performance = performance

    def set_targets(self, targets: Mapping[str, ClassTargets]) -> None:
        """Other targets from now on; what was needed for the old ones is forgotten."""
        self._targets = dict(targets)
        self._steady.forget()

    def hold(self, role: Role, workers: int) -> None:
        """A person has set this pool: it stays so until `release`."""
        self._manual[role] = workers

    def release(self, role: Role) -> None:
        """The planner decides about this pool again."""
        self._manual.pop(role, None)

    def step(self, now: float, observed: Observed) -> Decision:
        """One decision. Call it every `policy.interval`; any other rhythm is survived."""
        have = counted(serving(observed.workers))
        if held := self._unusable(now, observed):
            return self._held(now, observed, have, held)
        self._outlook.learn(observed)
        load = self._load(observed)
        self._beside = self._come(load, observed).beside(have)
        reasons = [spoken_load(load)]
        stuck = self._stuck(now, observed.workers)
        most = self.policy.max_workers
        if stuck:
            self._no_new_until = now + 5 * self.policy.cold_start
        if now < self._no_new_until:
            most = min(most, max(1, len(serving(observed.workers)) - len(stuck)))  # no nodes come
            reasons.append(
                f"{len(stuck)} workers have been starting for over "
                f"{2 * self.policy.cold_start:g} s: planning with the {most} that are there"
            )
        ready = sum(w.phase == "ready" for w in observed.workers)
        sizing = self._sized(load, most, have, ready, reasons)
        sizing = self._steadied(load, sizing, have, reasons)
        missed = shortfalls(load, sizing) if not sizing.enough else ()
        reasons += [spoken_shortfall(each) for each in missed]
        may_add = now >= self._no_new_until
        kept = self._kept(load, most)
        wish = self._steady.wish(now, sizing.counts, kept, have, self._manual, may_add, reasons)
        workers = [w for w in observed.workers if w not in stuck]
        removed = tuple(Remove(w.worker_id, "stuck while starting") for w in stuck)
        actions = (*removed, *plan_actions(self.policy, workers, wish))
        self._steady.acted(now, actions)
        if not actions:
            reasons.append("nothing to change")
        return Decision(
            now,
            after(observed.workers, actions),
            sizing.counts,
            tuple(actions),
            "",
            tuple(reasons),
            missed,
            inputs_of(load, observed),
        )

    # --- seeing ---------------------------------------------------------------------------------

    def _unusable(self, now: float, observed: Observed) -> str:
        """Why this observation decides nothing; empty if it does."""
        last, self._last = self._last, now
        if last is not None and not 0 <= now - last <= JUMP_INTERVALS * self.policy.interval:
            self._steady.forget()
            return f"the clock jumped by {now - last:+.1f} s"
        if not self.policy.max_workers:
            return "the budget has no room for one worker"
        age = now - observed.measured_at
        if not 0 <= age <= self.policy.stale_after:
            return f"the metrics are {age:.0f} s old"
        if not observed.traffic:
            return "there are no metrics"
        bad = [k for k, t in observed.traffic.items() if not 0 <= t.rate < math.inf]
        if bad:
            return f"the arrival rate of {', '.join(repr(k) for k in sorted(bad))} is not a number"
        if not math.isfinite(observed.queued_prompt_tokens):
            return "the backlog is not a number"
        unknown = [
            k for k in observed.traffic if k not in self._targets and "" not in self._targets
        ]
        return f"class {unknown[0]!r} has no targets" if unknown else ""

    def _held(self, now: float, observed: Observed, have: Counts, why: str) -> Decision:
        """Nothing is decided, except that no pool in use is left below its minimum – or above it,
        where the budget has no room for any worker."""
        room = self.policy.max_workers > 0
        least = self._at_least_minimum(have) if room else have
        wish = Wish(least, have, have)
        decides = least != have or not room
        actions = tuple(plan_actions(self.policy, observed.workers, wish)) if decides else ()
        reasons = (f"held: {why}",)
        target = after(observed.workers, actions)
        return Decision(now, target, least, actions, why, reasons)

    def _at_least_minimum(self, counts: Counts) -> Counts:
        least = self.policy.minimum
        if counts.both or self.policy.max_workers < 2 * least:
            return replace(counts, both=max(least, counts.both))
        return replace(counts, prefill=max(least, counts.prefill), decode=max(least, counts.decode))

    def _stuck(self, now: float, workers: tuple[WorkerSeen, ...]) -> list[WorkerSeen]:
        patience = 2 * self.policy.cold_start
        return [w for w in workers if w.waits and now - w.since > patience]

    # --- sizing ---------------------------------------------------------------------------------

    def _load(self, observed: Observed) -> Load:
        """What is expected when a worker that is started now would serve."""
        demands = self._outlook.feared(
            self.policy, observed, self._performance, self._targets, self._steady.patience
        )
        targets = {k: self._targets.get(k) or self._targets[""] for k in demands}
        return Load(self._performance, demands, targets, self._chunk)

    @staticmethod
    def _come(load: Load, observed: Observed) -> Load:
        """The same at the rates that were observed."""
        seen = {k: t.rate for k, t in observed.traffic.items()}
        demands = {k: replace(d, rate=seen.get(k, 0.0)) for k, d in load.demands.items()}
        return replace(load, demands=demands)

    def _kept(self, load: Load, most: int) -> Counts:
        """What would be enough for the rates that have come, in the mode that is on."""
        rates = self._outlook.come(self._targets, self._steady.patience)
        least = self.policy.minimum
        demands = {kind: replace(each, rate=rates[kind]) for kind, each in load.demands.items()}
        came = replace(load, demands=demands)
        split = None if self._whole else size_split(came, most, least)
        return (split or size_whole(came, most, least)).counts

    def _sized(self, load: Load, most: int, have: Counts, ready: int, reasons: list[str]) -> Sizing:
        """Split or not: the mode that needs fewer workers, or serves the worst class better.

        A mode is only left once the other was better over `MODE_STEPS` decisions, and for one that
        the workers which are ready can serve.
        """
        least = self.policy.minimum
        whole, split = size_whole(load, most, least), size_split(load, most, least)
        if self.policy.disaggregate == "never":
            self._whole = True
            reasons.append("placement.disaggregate is never: aggregated workers only")
            return whole
        if split is None:
            self._whole = True
            reasons.append(f"{most} worker(s) cannot be split into two pools")
            return whole
        if self._whole is None:
            self._whole = bool(have.both) and not (have.prefill or have.decode)
            if not have.total:
                self._whole = better(whole, split, 0.0)
        if self._manual:
            self._whole = self._held_whole(have)
        if self.policy.disaggregate == "always":
            self._whole = False
        now, other = (whole, split) if self._whole else (split, whole)
        self._modes.append((now, other))
        steady = (
            self.policy.disaggregate == "auto"
            and len(self._modes) == MODE_STEPS
            and load.rate > 0
            and not self._manual
            and all(better(o, n, self.policy.mode_gain) for n, o in self._modes)
        )
        if steady and max(o.counts.total for _, o in self._modes) <= ready:
            self._whole = not self._whole
            self._modes.clear()
            self._steady.turn()
            now, other = other, now
            reasons.append(f"from now on {'aggregated' if self._whole else 'split'}")
        name = "split" if self._whole else "aggregated"
        reasons.append(
            f"needed: {now.counts}, with which {now.worst:.1%} of the worst class meet their "
            f"targets; {name} it would be {other.counts}, with {other.worst:.1%}"
        )
        return now

    def _held_whole(self, have: Counts) -> bool:
        """The mode of what people have set: where there are two pools, they go on beside what is
        held in both. That there are no workers of one role is no mode."""
        if "both" in self._manual:
            pools = have.prefill > 0 and have.decode > 0
            return self._manual["both"] > 0 and have.both > 0 and not pools
        return bool(self._whole) and not any(self._manual.values())

    def _steadied(self, load: Load, best: Sizing, have: Counts, reasons: list[str]) -> Sizing:
        """Where nothing is enough, the split that is there, unless another is better by far or the
        best one has long been on the same side of it: in an overload it moves with every sample."""
        both_pools = have.prefill > 0 and have.decode > 0
        if best.enough or self._whole or have.total != best.counts.total or not both_pools:
            self._leaning.clear()
            return best
        self._leaning.append(best.counts.prefill - have.prefill)
        present = Sizing(have, load.split(have.prefill, have.decode), False)
        if best.worst > present.worst + 0.05 or abs(self._leaning[-1]) > max(1, have.total // 5):
            return best
        steady = len(self._leaning) == LEAN_STEPS
        if steady and (min(self._leaning) > 0 or max(self._leaning) < 0):
            move = min(self._leaning, key=abs)
            self._leaning.clear()
            counts = Counts(prefill=have.prefill + move, decode=have.decode - move)
            return Sizing(counts, load.split(counts.prefill, counts.decode), False)
        if best.counts != have:
            reasons.append(f"too little either way: it stays {have} unless that lasts")
        return present
