"""The plan in the store: state, log, and orders that are carried out once or not at all."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.errors import NotFound, Unavailable
from cluster.store import plans as module
from cluster.store.client import connect
from cluster.store.embedded import EmbeddedStore
from cluster.store.plan_records import (
    ActionRecord,
    DecisionRecord,
    ModelPlan,
    Order,
    PlanState,
    PlanView,
    Reply,
    ShortfallRecord,
    WantedWorker,
)
from cluster.store.plans import KEPT_DECISIONS, MAX_ORDERS, Plans

DECISION = DecisionRecord(
    7, 12.5, "m", "planner", True, {"prefill": 1}, {"prefill": 2}, {"prefill": 2},
    (ActionRecord("flip", "w", "prefill"),), "", ("because",),
    (ShortfallRecord("interactive", "ttft", 1.0, 0.5, math.inf),), {"rate_expected": 3.5},
)  # fmt: skip
STATE = PlanState(
    {"m": {"prefill": 1}}, (WantedWorker("w", "m", "decode", "prefill", "h100", True),),
    {"m": {"decode": 2}}, {"batch": {"ttft_seconds": 3.0}}, {"m": {"flips": 1}},
)  # fmt: skip


@pytest.fixture
async def plans(tmp_path: Path) -> AsyncIterator[Plans]:
    store = EmbeddedStore.start(tmp_path)
    client = await connect(store.url, 30.0)
    yield Plans(client, "c")
    await client.aclose()
    store.stop()


async def test_what_is_kept_comes_back_as_it_was(plans: Plans) -> None:
    assert await plans.state() is None and await plans.view() is None
    await plans.keep_state(STATE)
    assert await plans.state() == STATE
    targets = {"batch": {"share": 0.9}}
    model = ModelPlan("m", {"decode": 1}, {}, {}, ("w",), targets, {}, {}, {}, "x", DECISION)
    view = PlanView(9.0, "act", (model, ModelPlan("n", {}, {}, {}, (), {})))
    await plans.publish(view)
    assert await plans.view() == view


async def test_the_log_is_bounded_and_newest_first(plans: Plans) -> None:
    for i in range(KEPT_DECISIONS + 5):
        await plans.log(DecisionRecord(i, 0.0, "m", "planner", False, {}, {}, {}))
    await plans.log(DECISION)
    kept = await plans.decisions("m", 10_000)
    assert len(kept) == KEPT_DECISIONS and kept[0] == DECISION and kept[1].number > kept[2].number
    assert await plans.decisions("other", 5) == []


async def test_an_order_is_answered(plans: Plans) -> None:
    async def controller(reply: Reply) -> Order:
        while (taken := await plans.next_order()) is None:  # noqa: ASYNC110 - the store's
            await asyncio.sleep(0.01)
        mark, order = taken
        await plans.answer(mark, reply)
        return order

    order = Order("scale", "m", "decode", 3)
    said, taken = await asyncio.gather(plans.order(order, 30.0), controller(Reply("done")))
    assert (said, taken) == ("done", order)
    with pytest.raises(NotFound, match="no such"):
        await asyncio.gather(plans.order(order, 30.0), controller(Reply("no such", 5)))


async def test_an_order_that_nobody_waits_for_is_not_carried_out(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unavailable, match=r"did not answer within 0[.]1 s"):
        await plans.order(Order("drain", worker_id="w"), 0.1)
    await asyncio.sleep(0.1)
    assert await plans.next_order() is None
    monkeypatch.setattr(module, "POLL_SECONDS", 1.0)  # hundreds wait, and only that is of interest
    waiting = [
        asyncio.create_task(plans.order(Order("drain"), 30.0)) for _ in range(MAX_ORDERS + 9)
    ]
    async with asyncio.timeout(20):
        while len(await plans._client.keys("*:plan:order:*")) < len(waiting):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    taken = 0
    while await plans.next_order() is not None:
        taken += 1
    assert taken == MAX_ORDERS
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_another_version_wrote_is_left_unread(plans: Plans) -> None:
    client, prefix = plans._client, plans._prefix
    for raw in ('{"workers": [{"shape": "round"}]}', "not JSON", "[]", '{"models": 1, "at": 2}'):
        await client.set(f"{prefix}:state", raw)
        await client.set(f"{prefix}:view", raw)
        assert await plans.state() is None and await plans.view() is None
    await plans.log(DECISION)
    await client.lpush(f"{prefix}:decisions:m", '{"number": 8}')
    assert await plans.decisions("m", 5) == [DECISION]
    await client.set(f"{prefix}:order:a", '{"kind": "dance", "with": "me"}')
    await client.lpush(f"{prefix}:orders", "a")
    assert await plans.next_order() is None
