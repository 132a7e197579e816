"""Straight to the two workers that a router would take: what a first token takes without one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from functools import partial
from typing import Any

from bench.streams.clients import Seen, Times, Watch
from bench.streams.setting import PROBE, PROMPT, SECRET, stand_in_ids
from cluster.rpc.client import ClientCall, connected
from cluster.rpc.limits import Limits
from cluster.ticket import Ticket, TicketSigner, new_handoff_id, prompt_digest
from pdserve.v1 import common_pb2, worker_pb2

LIMITS = Limits(message_bytes=4 << 20, calls=0)
SERVE = f"/{worker_pb2.DESCRIPTOR.services_by_name['Worker'].full_name}/Serve"
CONNECT_SECONDS, TICKET_SECONDS = 10.0, 60.0
STAGES = {"prefill": worker_pb2.STAGE_PREFILL, "decode": worker_pb2.STAGE_DECODE}


class HopsClient:
    """Splits each request over the model PROBE's two workers, as a router does once it has decided.

    Args:
        records: of the workers, by role, as the registry has them.
    """

    def __init__(self, records: dict[str, dict[str, Any]]) -> None:
        self._records = records
        self._signer = TicketSigner(SECRET)
        self._stack = contextlib.AsyncExitStack()
        self._calls: dict[str, ClientCall] = {}
        self._numbers = itertools.count()
        self._watches: dict[str, tuple[Watch, asyncio.Event]] = {}

    async def run(self, model: str, max_tokens: int, seen: Seen, prompt: str = PROMPT) -> Times:
        """As `Client.run`; only its first token is looked at."""
        if not self._calls:
            for role in STAGES:
                self._calls[role] = await self._connect(role)
        watch, name = Watch(1, seen), f"hops-{next(self._numbers)}"
        first = asyncio.Event()
        self._watches[name] = watch, first
        start = worker_pb2.StartSequence(
            sequence_id=name,
            prompt_token_ids=stand_in_ids(prompt),
            sampling=common_pb2.SamplingParams(n=1, temperature=0, max_tokens=max_tokens),
        )
        start.ticket = self._ticket(name, start.prompt_token_ids)
        for role, stage in STAGES.items():
            start.stage = stage
            self._calls[role].send(worker_pb2.RouterMessage(start=start).SerializeToString())
        async with asyncio.timeout(CONNECT_SECONDS):
            await first.wait()
        return watch.end()

    async def close(self) -> None:
        await self._stack.aclose()

    async def _connect(self, role: str) -> ClientCall:
        record = self._records[role]
        connection = await self._stack.enter_async_context(
            connected(record["address"], LIMITS, CONNECT_SECONDS)
        )
        metadata = (("authorization", f"Bearer {self._signer.call_token()}"),)
        call = connection.open(SERVE, metadata, partial(self._received, role))
        hello = worker_pb2.Hello(
            router_id="hops", worker_id=record["worker_id"], incarnation=record["incarnation"]
        )
        call.send(worker_pb2.RouterMessage(hello=hello).SerializeToString())
        await call.begun
        return call

    def _received(self, role: str, data: bytes) -> None:
        """Prefill's one output of a sequence is its first token; decode's are of no interest."""
        for output in worker_pb2.WorkerMessage.FromString(data).outputs:
            if role == "prefill" and (waiting := self._watches.pop(output.sequence_id, None)):
                watch, first = waiting
                watch.saw(len(output.token_ids))
                first.set()

    def _ticket(self, name: str, token_ids: Any) -> bytes:
        prefill, decode = self._records["prefill"], self._records["decode"]
        now = time.time()
        return self._signer.sign(
            Ticket(
                handoff_id=new_handoff_id(),
                request_id=name,
                model=PROBE,
                prefill_worker=prefill["worker_id"],
                prefill_incarnation=prefill["incarnation"],
                decode_worker=decode["worker_id"],
                decode_incarnation=decode["incarnation"],
                prompt_digest=prompt_digest(token_ids),
                num_tokens=len(token_ids),
                tenant_salt="",
                layout=decode["layout"],
                prefill_geometry=prefill["geometry"],
                decode_geometry=decode["geometry"],
                issued_at=now,
                expires_at=now + TICKET_SECONDS,
            )
        )
