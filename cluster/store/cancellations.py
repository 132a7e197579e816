"""Cancellations from one router to the others: whoever runs the request hears of it."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis

from cluster.errors import Unavailable
from cluster.store.client import store_errors

ANSWER_SECONDS = 1.0
"""How long the routers have to answer."""

POLL_SECONDS = 5.0


class Cancellations:
    """Of one cluster. Every method raises `Unavailable` while the store is out."""

    def __init__(self, client: Redis, cluster_name: str) -> None:
        self._client: Any = client
        self._prefix = f"pdserve:{{{cluster_name}}}:cancel"

    async def ask(self, tenant: str, request_id: str) -> bool:
        """Cancels the tenant's request on whichever router runs it; False if none says it does."""
        reply = f"{self._prefix}:{secrets.token_hex(8)}"
        message = json.dumps({"tenant": tenant, "request_id": request_id, "reply": reply})
        loop = asyncio.get_running_loop()
        until = loop.time() + ANSWER_SECONDS
        with store_errors():
            routers = await self._client.publish(self._prefix, message)
            for _ in range(routers):
                left = max(0.05, until - loop.time())
                answer = await self._client.blpop([reply], timeout=left)
                if answer is None or answer[1] == "yes":
                    return answer is not None
        return False

    async def serve(self, cancel: Callable[[str, str], bool]) -> None:
        """Calls `cancel` with the tenant and id of every request to be cancelled, without end."""
        pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        try:
            with store_errors():
                await pubsub.subscribe(self._prefix)
            while True:
                with store_errors():
                    message = await pubsub.get_message(timeout=POLL_SECONDS)
                if message is None:
                    continue
                asked = json.loads(message["data"])
                done = cancel(asked["tenant"], asked["request_id"])
                with store_errors():
                    async with self._client.pipeline() as pipe:
                        pipe.rpush(asked["reply"], "yes" if done else "no")
                        pipe.pexpire(asked["reply"], round(2e3 * ANSWER_SECONDS))
                        await pipe.execute()
        finally:
            with suppress(Unavailable), store_errors():
                async with asyncio.timeout(1):
                    await pubsub.aclose()
