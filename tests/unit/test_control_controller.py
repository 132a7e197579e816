"""The controller's body without Ray: configurations reloaded, hosts that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.control import controller as module
from cluster.control import lives, store_view, turning
from cluster.control.controller import Controller
from cluster.control.fleet import End
from cluster.control.hosts import NODE_ID, Host, Need
from cluster.control.launch import Launch
from cluster.control.reconcile import Slot
from cluster.control.status import ClusterStatus
from cluster.errors import Unavailable
from cluster.store.plan_records import (
    DecisionRecord,
    Order,
    PlanState,
    PlanView,
    Reply,
    WaitingWorker,
)
from cluster.store.records import RouterRecord, WorkerRecord
from cluster.store.registry import Members

NODES = {"a": Host("a", "10.0.0.1", {"CPU": 2}, {NODE_ID: "a"}),
         "b": Host("b", "10.0.0.2", {"CPU": 2}, {NODE_ID: "b"})}  # fmt: skip
LIVES: dict[str, FakeLife] = {}
FAILING: dict[str, bool] = {}
KEPT: list[PlanState] = []
ORDERS: list[tuple[str, Order]] = []
REPLIES: dict[str, Reply] = {}
LOGGED: list[DecisionRecord] = []
VIEWS: list[PlanView] = []
WAITING: list[WaitingWorker] = []


class FakeLife:
    """Is placed and ready at once, on the node it aims at."""

    where = None
    lacks = complaint = ""
    frozen = False

    def __init__(
        self, launch: Launch, slot: Slot, incarnation: str, namespace: str, need: Need, aim: str
    ) -> None:
        self.slot, self.incarnation, self.need, self.aim = slot, incarnation, need, aim
        self.node_id = aim
        self.drained: float | None = None
        self.config = launch.config
        self.role = slot.role
        self.turns = 0
        self.ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        LIVES[slot.slot_id] = self

    def waits_for(self) -> str:
        return "" if self.node_id else "for a host"

    async def reload(self, config: Config) -> str:
        if self.frozen:
            await asyncio.Event().wait()
        self.config = config
        return self.complaint

    async def stop(self, drain_seconds: float) -> None:
        self.drained = drain_seconds
        await self.kill()

    async def set_role(self, role: str, drain_seconds: float) -> int:
        self.turns += 1
        if FAILING.get("turn"):
            raise Unavailable("the store does not answer")
        await asyncio.sleep(0)
        self.role = role
        return 0

    async def demand(self, mark: object) -> None:
        return None

    async def kill(self) -> None:
        if LIVES.get(self.slot.slot_id) is self:
            del LIVES[self.slot.slot_id]


class FakePlans:
    """The plan in memory; ORDERS are what operators ask for."""

    def __init__(self, *_: object) -> None:
        pass

    async def state(self) -> PlanState | None:
        return KEPT[-1] if KEPT else None

    async def keep_state(self, state: PlanState) -> None:
        KEPT.append(PlanState.from_json(state.to_json()))

    async def next_order(self) -> tuple[str, Order] | None:
        return ORDERS.pop(0) if ORDERS else None

    async def answer(self, mark: str, reply: Reply) -> None:
        REPLIES[mark] = reply

    async def tell_waiting(self, workers: Sequence[WaitingWorker], seconds: float) -> None:
        WAITING[:] = workers

    async def log(self, decision: DecisionRecord) -> None:
        LOGGED.append(decision)

    async def publish(self, view: PlanView) -> None:
        VIEWS.append(PlanView.from_json(view.to_json()))


class FakeRegistry:
    def __init__(self, *_: object) -> None:
        pass

    async def members(self) -> Members:
        lives = [life for life in LIVES.values() if life.node_id]
        workers = tuple(
            WorkerRecord(v.slot.slot_id, v.incarnation, v.slot.model, v.role, "ready")
            for v in lives
            if v.slot.kind == "worker"
        )
        routers = tuple(
            RouterRecord(v.slot.slot_id, v.incarnation, "h:1", "h:2")
            for v in lives
            if v.slot.kind == "router"
        )
        return Members(workers, routers)

    async def remove_worker(self, *_: str) -> bool:
        return True

    remove_router = remove_worker


def config(prefill: int = 1, ttft: float = 2.0, **sections: Any) -> Config:
    model = {"name": "m", "path": "/m", "prefill": {"replicas": prefill}}
    targets = {"ttft_seconds": ttft}
    return Config.model_validate({"models": [model], "targets": targets, **sections})


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Controller:
    async def connect(*_: object) -> None:
        return None

    for kept in (FAILING, LIVES, KEPT, ORDERS, REPLIES, LOGGED, VIEWS, WAITING):
        kept.clear()
    for name, fake in {
        "RayLife": FakeLife,
        "Registry": FakeRegistry,
        "Plans": FakePlans,
        "resource_names": list,
        "connect": connect,
        "hosts": lambda: list(NODES.values()),
        "any_gpus": lambda: False,
        "restarted": lambda: FAILING.get("controller", False),
        "drop_former_groups": lambda _: None,
        "redirect_output": lambda _: None,
        "INTERVAL_SECONDS": 0.01,
    }.items():
        for owner in (module, lives, store_view):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, fake)
    launch = Launch(config(), b"s" * 32, "", tmp_path, embedded=False)
    return Controller(launch, "n")


async def until(controller: Controller, true: Callable[[ClusterStatus], Any]) -> ClusterStatus:
    async with asyncio.timeout(30):
        while True:
            status = await controller.status()
            if true(status):
                return status
            await asyncio.sleep(0.01)


async def test_a_pool_that_grows_and_shrinks_leaves_the_others_alone(
    controller: Controller,
) -> None:
    await until(controller, lambda s: s.ready)
    first = dict(LIVES)
    await controller.reload(config(prefill=2, ttft=1.0))
    await until(controller, lambda s: s.ready and len(s.slots) == 4)
    assert all(LIVES[slot_id] is life for slot_id, life in first.items())
    assert first["router-0"].config.targets.ttft_seconds == 1.0
    added = LIVES["m-prefill-1"]
    await controller.reload(config(prefill=1))
    await until(controller, lambda s: s.ready and len(s.slots) == 3)
    assert added.drained == config().lifecycle.drain_timeout_seconds
    assert dict(LIVES) == first


async def test_routers_and_timeouts_follow_a_reload(controller: Controller) -> None:
    await until(controller, lambda s: s.ready)
    pool, drain = {"pool": {"replicas": 2}}, {"drain_timeout_seconds": 3.0}
    await controller.reload(config(prefill=2, router=pool, lifecycle=drain))
    await until(controller, lambda s: s.ready and len(s.slots) == 5)
    assert "router-1" in LIVES
    added, router = LIVES["m-prefill-1"], LIVES["router-1"]
    await controller.reload(config(lifecycle=drain))
    await until(controller, lambda s: s.ready and len(s.slots) == 3)
    assert (added.drained, router.drained) == (3.0, 3.0)


async def test_what_a_router_cannot_take_over_is_told(controller: Controller) -> None:
    await until(controller, lambda s: s.ready)
    LIVES["router-0"].complaint = "router-0: no such file"
    assert await controller.reload(config(ttft=1.0)) == ["router-0: no such file"]


async def test_a_restarted_controller_waits_for_the_configuration_that_counts_now(
    controller: Controller, tmp_path: Path
) -> None:
    FAILING["controller"] = True
    launch = Launch(config(), b"s" * 32, "", tmp_path, embedded=False)
    next_one = Controller(launch, "n")  # as Ray starts it anew: with what the first was given
    for _ in range(3):
        status = await next_one.status()
        assert status.needs_config
        await asyncio.sleep(0.05)
    assert not LIVES and not KEPT
    await next_one.reload(config(prefill=2))
    status = await until(next_one, lambda s: s.ready and len(s.slots) == 4)
    assert not status.needs_config
    assert KEPT[-1].base["m"] == {"prefill": 2, "decode": 1}


async def test_workers_that_wait_are_told_with_the_reason(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives, "hosts", list)
    await until(controller, lambda s: len(WAITING) == 2)
    assert {(w.worker_id, w.state, w.detail) for w in WAITING} == {
        ("m-prefill-0", "waiting", "for a host"),
        ("m-decode-0", "waiting", "for a host"),
    }
    monkeypatch.setattr(lives, "hosts", lambda: list(NODES.values()))
    for life in LIVES.values():
        life.node_id = "a"
    await until(controller, lambda s: not WAITING)


async def test_a_host_that_leaves_is_drained_and_its_lives_go_elsewhere(
    controller: Controller,
) -> None:
    await until(controller, lambda s: s.ready)
    here = {slot_id for slot_id, life in LIVES.items() if life.node_id == "a"}
    stay = {slot_id: life for slot_id, life in LIVES.items() if life.node_id == "b"}
    assert here and stay
    gone = [LIVES[slot_id] for slot_id in here]
    assert set(await controller.leave("a", 7.0)) == here
    assert {life.drained for life in gone} == {7.0}
    await until(controller, lambda s: s.ready)
    assert {life.node_id for life in LIVES.values()} == {"b"}
    assert all(LIVES[slot_id] is life for slot_id, life in stay.items())
    assert all(LIVES[slot_id].need.labels[NODE_ID] == "!in(a)" for slot_id in here)


async def test_what_no_host_can_take_is_said_and_waits(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives, "hosts", list)
    status = await until(controller, lambda s: any(life.lacks for life in LIVES.values()))
    assert {slot.state for slot in status.slots} == {"waiting"}
    assert {life.lacks for life in LIVES.values()} == {"there is no host"}
    monkeypatch.setattr(lives, "hosts", lambda: list(NODES.values()))
    for life in LIVES.values():
        life.node_id = "a"
    await until(controller, lambda s: s.ready)


async def told(controller: Controller, order: Order) -> Reply:
    mark = f"order-{len(REPLIES)}"
    ORDERS.append((mark, order))
    await until(controller, lambda _: mark in REPLIES)
    return REPLIES[mark]


async def test_a_flip_by_hand_keeps_the_life_and_is_kept(controller: Controller) -> None:
    await controller.reload(config(prefill=2))
    await until(controller, lambda s: s.ready and len(s.slots) == 4)
    first = dict(LIVES)
    reply = await told(controller, Order("flip", worker_id="m-prefill-1", role="decode"))
    assert not reply.code and "becomes decode" in reply.said
    await until(controller, lambda s: LIVES["m-prefill-1"].role == "decode")
    status = await until(controller, lambda s: s.ready)
    assert {s.slot_id: s.role for s in status.slots}["m-prefill-1"] == "decode"
    assert dict(LIVES) == first and LIVES["m-prefill-1"].turns == 1
    assert KEPT[-1].manual == {"m": {"prefill": 1, "decode": 2}}

    assert controller._loop is not None and controller._planning is not None
    controller._loop.cancel()
    controller._planning.cancel()
    again = Controller(controller._launch, "n")  # as Ray starts it anew: all lives are gone
    LIVES.clear()
    await until(again, lambda s: s.ready and len(s.slots) == 4)
    assert LIVES["m-prefill-1"].slot.role == "decode" and not LIVES["m-prefill-1"].turns
    reply = await told(again, Order("release", model="m"))
    assert not reply.code
    roles = ["m-decode-0", "m-prefill-0", "m-prefill-1"]
    await until(again, lambda s: [LIVES[r].role for r in roles].count("prefill") == 2)


async def test_a_turn_that_fails_is_tried_again(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turning, "AGAIN_SECONDS", 0.05)
    await controller.reload(config(prefill=2))
    await until(controller, lambda s: s.ready and len(s.slots) == 4)
    FAILING["turn"] = True
    await told(controller, Order("flip", worker_id="m-prefill-1", role="decode"))
    await until(controller, lambda s: LIVES["m-prefill-1"].turns >= 2)
    FAILING["turn"] = False
    await until(controller, lambda s: LIVES["m-prefill-1"].role == "decode")


async def test_scale_and_drain_by_hand_until_released(controller: Controller) -> None:
    await until(controller, lambda s: s.ready)
    reply = await told(controller, Order("scale", model="m", role="decode", workers=3))
    assert "held at 3 (was 1)" in reply.said
    await until(controller, lambda s: s.ready and len(s.slots) == 5)
    drained = LIVES["m-decode-1"]
    await told(controller, Order("drain", worker_id="m-decode-1"))
    await until(controller, lambda s: s.ready and len(s.slots) == 4)
    assert drained.drained == config().lifecycle.drain_timeout_seconds
    assert "m-decode-1" not in LIVES
    await asyncio.sleep(0.1)
    assert len(LIVES) == 4  # nothing was started in its place
    await told(controller, Order("release", worker_id="m-decode-1"))
    await until(controller, lambda s: s.ready and len(s.slots) == 5)
    await told(controller, Order("release", model="m"))
    await until(controller, lambda s: s.ready and len(s.slots) == 3)
    assert {"scale", "drain"}.isdisjoint(KEPT[-1].manual)
    assert [r.source for r in LOGGED] == ["operator"] * len(LOGGED) and LOGGED


async def test_targets_by_hand_reach_the_routers_and_outlive_a_reload(
    controller: Controller,
) -> None:
    await until(controller, lambda s: s.ready)
    await told(controller, Order("targets", slo_class="interactive", ttft_seconds=0.25))
    await until(
        controller, lambda s: LIVES["router-0"].config.classes.interactive.ttft_seconds == 0.25
    )
    await controller.reload(config(ttft=1.0))
    assert LIVES["router-0"].config.classes.interactive.ttft_seconds == 0.25
    assert VIEWS[-1].models[0].targets["interactive"]["ttft_seconds"] == 0.25
    reply = await told(controller, Order("release", slo_class="all"))
    assert not reply.code
    await until(
        controller, lambda s: LIVES["router-0"].config.classes.interactive.ttft_seconds == 2.0
    )


@pytest.mark.parametrize(
    ("order", "code", "says"),
    [
        (Order("scale", model="n", role="decode", workers=1), 5, "no model 'n'; there are m"),
        (Order("scale", model="m", role="chief", workers=1), 3, "they are prefill, decode, both"),
        (Order("scale", model="m", role="decode", workers=-1), 3, "must be 0 to"),
        (Order("flip", worker_id="m-decode-9", role="decode"), 5, "there are m-prefill-0"),
        (Order("flip", worker_id="m-decode-0", role="decode"), 3, "is decode already"),
        (Order("drain", worker_id="nobody"), 5, "there is no worker"),
        (Order("release", model="m"), 5, "no pool of 'm' is held"),
        (Order("release", worker_id="m-decode-0"), 3, "is not drained"),
        (Order("targets", slo_class="vip", ttft_seconds=1), 3, "interactive, standard, batch"),
        (Order("targets", slo_class="batch"), 3, "or both"),
    ],
)  # fmt: skip
async def test_orders_that_cannot_be(
    controller: Controller, order: Order, code: int, says: str
) -> None:
    await until(controller, lambda s: s.ready)
    reply = await told(controller, order)
    assert reply.code == code and says in reply.said
    assert not KEPT or KEPT[-1].manual == {}


async def test_a_router_that_does_not_answer_stops_nothing(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TELL_SECONDS", 0.05)
    await until(controller, lambda s: s.ready)
    LIVES["router-0"].frozen = True
    (said,) = await controller.reload(config(ttft=1.0))
    assert said.startswith("router-0: did not answer")
    await told(controller, Order("targets", slo_class="batch", ttft_seconds=9))
    LIVES["m-decode-0"].ended.set_result(End("killed"))
    await until(controller, lambda s: any(slot.failures for slot in s.slots))


async def test_a_cluster_whose_loop_broke_is_shut_down_in_order(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(controller, lambda s: s.ready)
    router = LIVES["router-0"]

    def broken(*_: object) -> Members:
        raise TypeError("a record of another version")

    with monkeypatch.context() as once:
        once.setattr(FakeRegistry, "members", broken)
        assert controller._loop is not None
        await asyncio.wait([controller._loop], timeout=30)
    await controller.shutdown(3.0)
    assert not LIVES and router.drained is not None
