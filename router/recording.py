"""The request log for operators: what came, how long it was, which prefix blocks it began with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

from cluster.errors import Overloaded, PdserveError, Unavailable
from cluster.prefix import block_hashes
from cluster.rpc.call import Call
from cluster.store.records import JournalEntry
from pdserve.v1 import operator_pb2
from router.caller import shown_by
from router.client_wire import refuse_unknown_fields
from router.observe import Observer
from router.refusal import refuse
from router.running import Running
from router.states import TERMINAL
from router.tenants import Tenants

BLOCK_TOKENS = 64
PAST_ENTRIES = 20_000
WAITING = 4096
"""Records that a reader has not taken; one that lets more gather is cut off."""


class History(Protocol):
    """The journal's past."""

    async def latest(self, count: int) -> list[JournalEntry]: ...


class Recording:
    """Tells readers of the past and of what ends. Hashes are taken only while somebody reads."""

    def __init__(self, observer: Observer, journal: Any) -> None:
        self._observer = observer
        self._journal: History | None = journal if hasattr(journal, "latest") else None

    async def serve(
        self,
        request: operator_pb2.RecordRequest,
        call: Call,
        callers: Tenants,
    ) -> None:
        """One reader, until it leaves or, without `follow`, has the past."""
        try:
            callers.check_steering(shown_by(call))
            refuse_unknown_fields(request)
            if request.past_seconds > 0:
                for message in await self._past(request.past_seconds):
                    await call.write(message)
            if request.follow:
                await self._follow(call.write)
        except PdserveError as error:
            await refuse(call, error)

    async def _past(self, seconds: float) -> list[operator_pb2.RequestRecord]:
        if self._journal is None:
            raise Unavailable("this router has no store, and so no past")
        since = time.time() - seconds
        entries = await self._journal.latest(PAST_ENTRIES)
        return [
            operator_pb2.RequestRecord(
                at_seconds=entry.received_at,
                model=entry.model,
                slo_class=entry.slo_class,
                prompt_tokens=entry.prompt_tokens,
                output_tokens=entry.completion_tokens,
            )
            for entry in reversed(entries)
            if entry.received_at >= since and entry.state in TERMINAL
        ]

    async def _follow(self, write: Callable[[Any], Any]) -> None:
        waiting: asyncio.Queue[operator_pb2.RequestRecord] = asyncio.Queue()

        def ended(running: Running) -> None:
            if waiting.qsize() <= WAITING:
                waiting.put_nowait(_record(running))

        self._observer.readers.append(ended)
        try:
            while True:
                await write(await waiting.get())
                if waiting.qsize() > WAITING:
                    raise Overloaded("the reader is too slow: records were lost", 1.0)
        finally:
            self._observer.readers.remove(ended)


def _record(running: Running) -> operator_pb2.RequestRecord:
    generation = running.generation
    blocks = block_hashes(generation.prompt_token_ids, BLOCK_TOKENS, generation.cache_salt)
    return operator_pb2.RequestRecord(
        at_seconds=running.received_wall,
        model=generation.model,
        slo_class=generation.slo.slo_class.value,
        prompt_tokens=len(generation.prompt_token_ids),
        output_tokens=running.request.tokens,
        blocks=blocks.tolist(),
        block_tokens=BLOCK_TOKENS,
    )
