"""From counts to actions: flips first, then new workers, then removals; never over the budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.planner.state import (
    NOT_NEEDED,
    OVER_BUDGET,
    ROLES,
    Action,
    Add,
    Counts,
    Flip,
    Policy,
    Remove,
    Role,
    WorkerSeen,
)


@dataclass(frozen=True)
class Wish:
    """What the planner wants of the workers that are there.

    Attributes:
        want: counts to have.
        lend: counts below which a pool gives no worker to another: its needs of the last moments.
        keep: counts below which a pool gives no worker up for good: its needs of late.
        held: pools that a person has set: they are brought to `want`, and lend nothing.
        may_add: new workers may be started.
    """

    want: Counts
    lend: Counts
    keep: Counts
    held: frozenset[Role] = frozenset()
    may_add: bool = True


@dataclass
class _Ledger:
    """The workers as the actions so far leave them."""

    pools: dict[Role, list[WorkerSeen]]
    used: Counter[str]
    leaving: Counter[str]
    actions: list[Action] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    promised: set[str] = field(default_factory=set)
    """Of these, those that do not move in this decision: they still serve where they were."""

    def serving(self, role: Role) -> int:
        """Workers of the pool once this decision is carried out."""
        return sum(w.worker_id not in self.promised for w in self.pools[role])

    def over(self, policy: Policy) -> set[str]:
        """Node types that would hold more than their budget once those that leave are gone."""
        return {
            node_type
            for node_type, gpus in policy.budget.items()
            if self.used[node_type] - self.leaving[node_type] > gpus // policy.worker_gpus
        }

    def end(self, role: Role, reason: str, least: int, over: set[str], must: bool) -> bool:
        """Removes a worker of the pool that does not just change its role, best – or, if it `must`
        be, only – one of the node types `over`; False if none is, or if fewer than `least` would
        serve."""
        if self.serving(role) <= least:
            return False
        staying = [w for w in self.pools[role] if w.worker_id not in self.moved]
        ones = [w for w in staying if w.node_type in over] or ([] if must else staying)
        if not ones:
            return False
        self.pools[role].remove(ones[0])
        self.leaving[ones[0].node_type] += 1
        self.actions.append(Remove(ones[0].worker_id, reason))
        return True


def serving(workers: Iterable[WorkerSeen]) -> list[WorkerSeen]:
    """Those that serve or will: all but the draining."""
    return [w for w in workers if w.phase != "draining"]


def counted(workers: Iterable[WorkerSeen]) -> Counts:
    """Workers by role."""
    by_role = Counter(w.role for w in workers)
    return Counts(by_role["prefill"], by_role["decode"], by_role["both"])


def plan_actions(policy: Policy, workers: Sequence[WorkerSeen], wish: Wish) -> list[Action]:
    """The steps of one decision, each kind at most `policy.max_step`.

    A draining worker keeps its GPU until it is gone, so it counts against the budget and towards no
    pool. A pool lends a worker to one that lacks it down to `lend`, and down to what it wants where
    no new one can be had.
    """
    pools: dict[Role, list[WorkerSeen]] = {role: [] for role in ROLES}
    for worker in serving(workers):
        pools[worker.role].append(worker)
    for pool in pools.values():  # the newest go first: the oldest have the warmest caches
        pool.sort(key=lambda w: (w.phase == "ready", -w.since))
    leaving = Counter(w.node_type for w in workers if w.phase == "draining")
    ledger = _Ledger(pools, Counter(w.node_type for w in workers), leaving)
    _flip(policy, wish, ledger)
    if wish.may_add:
        _add(policy, wish, ledger)
    _remove(policy, wish, ledger)
    return ledger.actions


def after(workers: Sequence[WorkerSeen], actions: Iterable[Action]) -> Counts:
    """The counts that the actions lead to."""
    roles = {w.worker_id: w.role for w in serving(workers)}
    added: Counter[Role] = Counter()
    for action in actions:
        match action:
            case Flip(worker_id, role):
                roles[worker_id] = role
            case Add(role, _):
                added[role] += 1
            case Remove(worker_id):
                roles.pop(worker_id, None)
    by_role = Counter(roles.values()) + added
    return Counts(by_role["prefill"], by_role["decode"], by_role["both"])


def _room(policy: Policy, ledger: _Ledger) -> list[str]:
    """Node types with room for one more worker, one entry each."""
    free: list[str] = []
    for node_type, gpus in policy.budget.items():
        free += [node_type] * (gpus // policy.worker_gpus - ledger.used[node_type])
    return free


def _lacking(wish: Wish, ledger: _Ledger) -> list[Role]:
    """Roles in the order in which they should get a worker, once per worker they lack."""
    lacks = {role: wish.want.of(role) - len(ledger.pools[role]) for role in ROLES}
    order: list[Role] = []
    for role in sorted(lacks, key=lambda r: lacks[r] / max(1, wish.want.of(r)), reverse=True):
        order += [role] * max(0, lacks[role])
    return order


def _flip(policy: Policy, wish: Wish, ledger: _Ledger) -> None:
    flips = 0
    ready = sum(w.phase == "ready" for pool in ledger.pools.values() for w in pool)
    # A worker that changes its role serves nobody while it drains: half of them go on.
    most = min(policy.max_step, max(1, ready // 2))
    room = len(_room(policy, ledger)) if wish.may_add else 0
    for role in _lacking(wish, ledger):
        floor = wish.lend if room > 0 else wish.want
        spare = {
            r: len(ledger.pools[r]) - max(floor.of(r), wish.want.of(r))
            for r in ROLES
            if r != role and r not in wish.held
        }
        giver = max(spare, key=lambda r: spare[r], default=None)
        if giver is None or spare[giver] <= 0:
            room -= 1
            continue
        worker = ledger.pools[giver].pop(0)
        ledger.pools[role].append(worker)
        ledger.moved.add(worker.worker_id)
        if flips < most:  # else it is promised: nothing is started in its place, nor is it ended
            ledger.actions.append(Flip(worker.worker_id, role))
            flips += 1
        else:
            ledger.promised.add(worker.worker_id)


def _add(policy: Policy, wish: Wish, ledger: _Ledger) -> None:
    room = _room(policy, ledger)
    for role, node_type in list(zip(_lacking(wish, ledger), room, strict=False))[: policy.max_step]:
        ledger.actions.append(Add(role, node_type))


def _remove(policy: Policy, wish: Wish, ledger: _Ledger) -> None:
    """What is kept for no reason, and what a smaller budget has no room for: those that drain give
    their room back without any other's end."""
    reasons: list[tuple[Role, str]] = []
    for role in ROLES:
        surplus = len(ledger.pools[role]) - max(wish.keep.of(role), wish.want.of(role))
        reasons += [(role, NOT_NEEDED)] * surplus
    removed = 0
    for role, reason in reasons[: policy.max_step]:
        least = min(policy.minimum, wish.want.of(role))
        removed += ledger.end(role, reason, least, ledger.over(policy), must=False)
    while removed < policy.max_step and (over := ledger.over(policy)):
        # The pool that exceeds its want most gives way, but each keeps its minimum.
        excess = {role: len(ledger.pools[role]) - wish.want.of(role) for role in ROLES}
        roles = sorted(ROLES, key=excess.__getitem__, reverse=True)
        if not any(ledger.end(r, OVER_BUDGET, policy.minimum, over, must=True) for r in roles):
            return
        removed += 1
