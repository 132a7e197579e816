"""The reconcile core under a virtual clock."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.clock import VirtualClock
from cluster.config import Config
from cluster.control.reconcile import (
    MAX_QUICK_FAILURES,
    QUICK_SECONDS,
    DropLease,
    GiveUp,
    Kill,
    Lease,
    Life,
    Observed,
    Slot,
    SlotState,
    Start,
    Stop,
    backoff,
    desired_slots,
    ended,
    reconcile,
    renewed,
)

P0 = Slot("worker", "m-prefill-0", "m", "prefill")
D0 = Slot("worker", "m-decode-0", "m", "decode")
R0 = Slot("router", "router-0")
READY = Life("aa", "ready", 0.0, 1.0)


def test_the_configured_slots() -> None:
    config = Config.model_validate(
        {"models": [{"name": "org/m", "path": "/m", "prefill": {"replicas": 2}}]}
    )
    ids = [slot.slot_id for slot in desired_slots(config)]
    assert ids == ["org-m-prefill-0", "org-m-prefill-1", "org-m-decode-0", "router-0"]


def test_an_empty_cluster_starts_every_slot() -> None:
    assert reconcile(0, (P0, D0, R0), Observed(())) == [Start(P0), Start(D0), Start(R0)]


def test_a_cluster_that_is_as_wanted_is_left_alone() -> None:
    seen = Observed((SlotState(P0, READY),), (Lease("worker", "m-prefill-0", "aa"),))
    assert reconcile(5, (P0,), seen) == []


def test_a_worker_that_dies_after_a_long_life_is_restarted_at_once() -> None:
    state = ended(SlotState(P0, READY), now=1 + QUICK_SECONDS, reason="killed")
    assert reconcile(1 + QUICK_SECONDS, (P0,), Observed((state,))) == [Start(P0)]


def test_a_worker_that_dies_quickly_waits_longer_each_time_and_is_then_given_up() -> None:
    clock, state, waits = VirtualClock(), SlotState(P0), []
    while not state.gave_up:
        died = clock.now()
        state = ended(replace(state, life=Life("x", "starting", died)), died, "no model")
        while not (actions := reconcile(clock.now(), (P0,), Observed((state,)))):
            clock.advance(0.5)
        waits.append(clock.now() - died)
        if actions == [GiveUp("m-prefill-0", "no model")]:
            state = replace(state, gave_up=True)
    assert waits == [1.0, 2.0, 0.0]
    assert len(waits) == MAX_QUICK_FAILURES
    clock.advance(3600)
    assert reconcile(clock.now(), (P0,), Observed((state,))) == []


def test_a_slot_that_has_served_is_tried_again_for_ever() -> None:
    clock, state, waits = VirtualClock(), SlotState(P0, READY), []
    clock.advance(2)
    for _ in range(8):
        died = clock.now()
        state = ended(state, died, "the GPU is gone")
        while not (actions := reconcile(clock.now(), (P0,), Observed((state,)))):
            clock.advance(0.5)
        assert actions == [Start(P0)]
        waits.append(clock.now() - died)
        state = replace(state, life=Life("x", "starting", clock.now()))
    assert waits == [1, 2, 60, 120, 240, 300, 300, 300]


def test_a_reason_that_cannot_go_away_is_not_tried_again() -> None:
    state = ended(SlotState(P0, READY), 2, "models.m.dtype: no", permanent=True)
    assert reconcile(2, (P0,), Observed((state,))) == [GiveUp("m-prefill-0", "models.m.dtype: no")]


def test_a_life_without_a_host_waits_for_one_without_limit() -> None:
    state = SlotState(P0, Life("aa", "starting", 0.0))
    assert reconcile(1e6, (P0,), Observed((state,)), start_timeout=10) == []


def test_other_wanted_slots_keep_every_life_and_forget_every_failure() -> None:
    other = Slot("worker", "m-prefill-1", "m", "prefill")
    living = SlotState(P0, Life("aa", "ready", 0.0))
    failed = SlotState(other, failures=3, gave_up=True)
    states = {P0.slot_id: living, other.slot_id: failed}
    assert renewed(states, (other,)) == {other.slot_id: SlotState(other), P0.slot_id: living}
    (start, stop) = reconcile(0, (other,), Observed(tuple(renewed(states, (other,)).values())))
    assert (start, stop) == (Start(other), Stop(P0.slot_id, "aa"))


def test_routers_are_a_pool() -> None:
    config = Config.model_validate(
        {"models": [{"name": "m", "path": "p"}], "router": {"pool": {"replicas": 2}}}
    )
    routers = [slot.slot_id for slot in desired_slots(config) if slot.kind == "router"]
    assert routers == ["router-0", "router-1"]


def test_a_start_that_takes_too_long_is_killed() -> None:
    state = SlotState(P0, Life("aa", "starting", -99.0, placed_at=0.0))
    assert reconcile(10, (P0,), Observed((state,)), start_timeout=10) == []
    (action,) = reconcile(10.1, (P0,), Observed((state,)), start_timeout=10)
    assert isinstance(action, Kill) and "start_timeout" in action.reason


def test_surplus_is_drained_once() -> None:
    state = SlotState(P0, READY)
    assert reconcile(5, (), Observed((state,))) == [Stop("m-prefill-0", "aa")]
    stopping = replace(state, life=replace(READY, phase="stopping"))
    assert reconcile(5, (), Observed((stopping,))) == []


def test_leases_of_other_lives_are_dropped() -> None:
    stale = Lease("worker", "m-prefill-0", "old")
    gone = Lease("worker", "m-prefill-9", "zz")
    seen = Observed((SlotState(P0, READY),), (stale, Lease("worker", "m-prefill-0", "aa"), gone))
    assert reconcile(5, (P0,), seen) == [DropLease(stale), DropLease(gone)]


@given(st.integers(0, 10_000))
def test_the_pause_is_bounded(failures: int) -> None:
    assert 0 <= backoff(failures) <= backoff(failures + 1) <= 300


class Cluster:
    """What the controller does with the actions, under a virtual clock."""

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        self.clock = VirtualClock()
        self.slots = slots
        self.states = {slot.slot_id: SlotState(slot) for slot in slots}
        self.starts: list[tuple[float, str]] = []

    def tick(self) -> None:
        now = self.clock.now()
        for action in reconcile(now, self.slots, Observed(tuple(self.states.values()))):
            if isinstance(action, Start):
                slot_id = action.slot.slot_id
                assert self.states[slot_id].life is None
                self.starts.append((now, slot_id))
                life = Life(str(len(self.starts)), "starting", now)
                self.states[slot_id] = replace(self.states[slot_id], life=life)
            elif isinstance(action, GiveUp):
                state = self.states[action.slot_id]
                self.states[action.slot_id] = replace(state, gave_up=True)
        self.clock.advance(0.5)


@given(
    st.lists(
        st.tuples(st.sampled_from(["die", "ready", "tick", "wait"]), st.sampled_from([P0, D0])),
        max_size=60,
    )
)
def test_whatever_happens_each_slot_lives_waits_or_says_why_it_gave_up(
    events: list[tuple[str, Slot]],
) -> None:
    cluster = Cluster((P0, D0))
    for event, slot in events:
        state = cluster.states[slot.slot_id]
        now = cluster.clock.now()
        if event == "die" and state.life is not None:
            cluster.states[slot.slot_id] = ended(state, now, "killed")
        elif event == "ready" and state.life is not None and state.life.phase == "starting":
            life = replace(state.life, phase="ready", ready_at=now)
            cluster.states[slot.slot_id] = replace(state, life=life)
        elif event == "wait":
            cluster.clock.advance(QUICK_SECONDS)
        cluster.tick()
    cluster.clock.advance(300)
    cluster.tick()
    for state in cluster.states.values():
        assert (state.life is not None) != state.gave_up
        assert not (state.gave_up and state.served)
        assert not state.gave_up or (state.reason and state.failures >= MAX_QUICK_FAILURES)
    starts = [at for at, slot_id in cluster.starts if slot_id == P0.slot_id]
    for first, last in zip(starts, starts[MAX_QUICK_FAILURES:], strict=False):
        assert last - first > QUICK_SECONDS  # nothing crash-loops
