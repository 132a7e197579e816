"""The plan in the store: its state, the log of decisions, and the orders between routers and the
controller.

An order is a key with a time to live and its id in a list: one that nobody waits for any more is
never carried out. The log keeps the latest `KEPT_DECISIONS` of each model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from redis.asyncio import Redis

from cluster.errors import Unavailable, error_from_code
from cluster.store.client import store_errors
from cluster.store.plan_records import (
    DecisionRecord,
    Order,
    PlanState,
    PlanView,
    Reply,
    WaitingWorker,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

KEPT_DECISIONS = 500
POLL_SECONDS = 0.05
MAX_ORDERS = 256
"""Waiting; the oldest are dropped, and whoever asked is told that nobody answered."""


class Plans:
    """The plan of one cluster. Every method raises `Unavailable` while the store is out."""

    def __init__(self, client: Redis, cluster_name: str) -> None:
        self._client: Any = client
        self._prefix = f"pdserve:{{{cluster_name}}}:plan"

    async def state(self) -> PlanState | None:
        """None before any was kept, or if another version of pdserve wrote it."""
        with store_errors():
            raw = await self._client.get(f"{self._prefix}:state")
        return _read(PlanState.from_json, raw)

    async def keep_state(self, state: PlanState) -> None:
        with store_errors():
            await self._client.set(f"{self._prefix}:state", state.to_json())

    async def view(self) -> PlanView | None:
        """None before any was published, or if another version of pdserve wrote it."""
        with store_errors():
            raw = await self._client.get(f"{self._prefix}:view")
        return _read(PlanView.from_json, raw)

    async def publish(self, view: PlanView) -> None:
        with store_errors():
            await self._client.set(f"{self._prefix}:view", view.to_json())

    async def waiting(self) -> tuple[WaitingWorker, ...]:
        """Workers that have no process yet, as the controller last told."""
        with store_errors():
            raw = await self._client.get(f"{self._prefix}:waiting")
        return _read(_waiting, raw) or ()

    async def tell_waiting(self, workers: Sequence[WaitingWorker], seconds: float) -> None:
        """Counts for so many seconds."""
        raw = json.dumps([asdict(worker) for worker in workers])
        with store_errors():
            await self._client.set(f"{self._prefix}:waiting", raw, px=round(seconds * 1000))

    async def log(self, decision: DecisionRecord) -> None:
        key = self._log(decision.model)
        with store_errors():
            pipe = self._client.pipeline(transaction=True)
            pipe.lpush(key, decision.to_json())
            pipe.ltrim(key, 0, KEPT_DECISIONS - 1)
            await pipe.execute()

    async def decisions(self, model: str, count: int) -> list[DecisionRecord]:
        """The model's latest decisions, newest first."""
        with store_errors():
            raws = await self._client.lrange(self._log(model), 0, count - 1)
        found = (_read(DecisionRecord.from_json, raw) for raw in raws)
        return [decision for decision in found if decision is not None]

    async def order(self, order: Order, timeout: float) -> str:
        """Has the controller carry out an order; what it did, in words.

        Raises:
            PdserveError: it was refused, or nobody answered within `timeout` seconds.
        """
        mark = secrets.token_hex(8)
        with store_errors():
            pipe = self._client.pipeline(transaction=True)
            pipe.set(f"{self._prefix}:order:{mark}", order.to_json(), px=round(timeout * 1000))
            pipe.lpush(f"{self._prefix}:orders", mark)
            pipe.ltrim(f"{self._prefix}:orders", 0, MAX_ORDERS - 1)
            await pipe.execute()
        deadline = asyncio.get_running_loop().time() + timeout
        while asyncio.get_running_loop().time() < deadline:
            with store_errors():
                raw = await self._client.getdel(f"{self._prefix}:reply:{mark}")
            if raw:
                reply = Reply.from_json(raw)
                if reply.code:
                    raise error_from_code(reply.code, reply.said, retryable=False)
                return reply.said
            await asyncio.sleep(POLL_SECONDS)
        raise Unavailable(
            f"the controller did not answer within {timeout:g} s: see `pdserve status` and its log"
        )

    async def next_order(self) -> tuple[str, Order] | None:
        """The oldest order that somebody waits for, and its mark; taken once."""
        while True:
            with store_errors():
                mark = await self._client.rpop(f"{self._prefix}:orders")
                if mark is None:
                    return None
                raw = await self._client.getdel(f"{self._prefix}:order:{mark}")
            if (order := _read(Order.from_json, raw)) is not None:
                return mark, order

    async def answer(self, mark: str, reply: Reply) -> None:
        """To whoever gave the order."""
        with store_errors():
            await self._client.set(f"{self._prefix}:reply:{mark}", reply.to_json(), ex=60)

    def _log(self, model: str) -> str:
        return f"{self._prefix}:decisions:{model}"


def _waiting(raw: str) -> tuple[WaitingWorker, ...]:
    return tuple(WaitingWorker(**each) for each in json.loads(raw))


def _read(parse: Callable[[str], T], raw: str | None) -> T | None:
    """Versions meet while a cluster is renewed: what one cannot read is no reason to end."""
    if not raw:
        return None
    try:
        return parse(raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("left unread, another version may have written it: %r", error)
        return None
