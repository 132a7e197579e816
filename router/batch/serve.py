"""Serves one line of a batch as a request of its tenant, in the batch class."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import replace

from cluster.clock import Clock
from cluster.errors import NotFound, Overloaded, PdserveError
from cluster.store.batch_records import BatchJob
from router.admission.offers import SloClass
from router.answer import Answer
from router.batch import lines
from router.generation import Urgency
from router.http.bodies import ChatBody
from router.http.generate import collect
from router.http.replies import ChatReply, CompletionReply
from router.reception import Reception
from router.tenants import Tenants

MAX_FAILURES = 5
MAX_PAUSE_SECONDS = 10.0


class LineServer:
    """Calls it with a job, a line's number and the line."""

    def __init__(self, reception: Reception, tenants: Tenants, clock: Clock) -> None:
        self._reception = reception
        self._tenants = tenants
        self._clock = clock

    async def __call__(self, job: BatchJob, number: int, raw: str) -> tuple[str, bool]:
        """Its result, and whether it failed; what may pass is tried again until it does."""
        failures = 0
        for attempt in itertools.count():
            try:
                return await self._serve(job, number, raw, attempt), False
            except Overloaded as error:
                pause = error.retry_after_seconds
            except PdserveError as error:
                failures += 1
                if not error.retryable or failures >= MAX_FAILURES:
                    return lines.failure(number, _custom_id(raw), error), True
                pause = 2.0**failures
            except Exception as error:
                # Its page would be served again and again, with all the lines beside it.
                return lines.failure(number, _custom_id(raw), error), True
            await asyncio.sleep(min(pause, MAX_PAUSE_SECONDS))
        raise AssertionError("unreachable")

    async def _serve(self, job: BatchJob, number: int, raw: str, attempt: int) -> str:
        tenant = self._tenants.named(job.tenant)
        if tenant is None:
            raise NotFound(f"there is no tenant {job.tenant} any more")
        line = lines.read(raw)
        body = line.asked()
        request_id = f"{job.batch_id}-{number}.{attempt}"
        left = job.deadline_at - self._clock.wall()
        ask = body.asked(self._clock.now(), left, request_id)
        urgency = Urgency(SloClass.BATCH)
        answer = await self._reception.receive(
            tenant, replace(ask, request_id=request_id, urgency=urgency)
        )
        try:
            return lines.success(line.custom_id, request_id, await _whole(answer, body))
        finally:
            answer.leave()


async def _whole(answer: Answer, body: object) -> dict[str, object]:
    kind = ChatReply if isinstance(body, ChatBody) else CompletionReply
    reply = kind(answer.request_id, answer.model, int(time.time()), include_usage=False)
    return await collect(answer, reply)


def _custom_id(raw: str) -> str:
    try:
        return lines.read(raw).custom_id
    except PdserveError:
        return ""
