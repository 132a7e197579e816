"""The Batch service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cluster.errors import InvalidRequest
from cluster.rpc.call import Call
from cluster.store.batch_records import BatchJob
from pdserve.v1 import batch_pb2, batch_pb2_grpc
from router.batch import lines
from router.batch.desk import BatchDesk
from router.caller import shown_by
from router.client_wire import refuse_unknown_fields
from router.refusal import refusing
from router.tenants import Tenant, Tenants


class BatchServicer(batch_pb2_grpc.BatchServicer):
    """Submit, Get, List, Cancel and Results over gRPC.

    Args:
        max_bytes: of a job's input.
    """

    def __init__(self, desk: BatchDesk, tenants: Tenants, max_bytes: int) -> None:
        self._desk = desk
        self._tenants = tenants
        self._max_bytes = max_bytes

    @refusing
    async def Submit(
        self, requests: AsyncIterator[batch_pb2.SubmitBatchRequest], call: Call
    ) -> batch_pb2.BatchJob:
        tenant = self._tenant(call)
        header: batch_pb2.BatchHeader | None = None
        content = bytearray()
        async for request in requests:
            refuse_unknown_fields(request)
            if (request.WhichOneof("part") == "header") != (header is None):
                raise InvalidRequest("header", "must be the first message, and no other")
            if header is None:
                header = request.header
            content += request.content
            if len(content) > self._max_bytes:
                raise InvalidRequest("content", f"must be at most {self._max_bytes} bytes")
        if header is None:
            raise InvalidRequest("header", "is required")
        raw_lines = await asyncio.to_thread(lines.split, bytes(content))
        metadata = dict(header.metadata)
        return _job(await self._desk.submit(tenant, header.endpoint, raw_lines, metadata))

    @refusing
    async def Get(self, request: batch_pb2.GetBatchRequest, call: Call) -> batch_pb2.BatchJob:
        tenant = self._tenant(call)
        refuse_unknown_fields(request)
        return _job(await self._desk.get(tenant, request.batch_id))

    @refusing
    async def List(
        self, request: batch_pb2.ListBatchesRequest, call: Call
    ) -> batch_pb2.ListBatchesResponse:
        tenant = self._tenant(call)
        refuse_unknown_fields(request)
        jobs = await self._desk.latest(tenant, request.limit or 20, request.after)
        return batch_pb2.ListBatchesResponse(jobs=map(_job, jobs))

    @refusing
    async def Cancel(self, request: batch_pb2.CancelBatchRequest, call: Call) -> batch_pb2.BatchJob:
        tenant = self._tenant(call)
        refuse_unknown_fields(request)
        return _job(await self._desk.cancel(tenant, request.batch_id))

    @refusing
    async def Results(self, request: batch_pb2.BatchResultsRequest, call: Call) -> None:
        tenant = self._tenant(call)
        refuse_unknown_fields(request)
        async for result, failed in self._desk.follow(
            tenant, request.batch_id, not request.no_wait
        ):
            await call.write(batch_pb2.BatchResult(json=result, failed=failed))

    def _tenant(self, call: Call) -> Tenant:
        return self._tenants.identify(shown_by(call))


def _job(job: BatchJob) -> batch_pb2.BatchJob:
    return batch_pb2.BatchJob(
        batch_id=job.batch_id,
        endpoint=job.endpoint,
        state=job.state,
        total=job.total,
        completed=job.completed,
        failed=job.failed,
        created_at_seconds=job.created_at,
        deadline_at_seconds=job.deadline_at,
        ended_at_seconds=job.ended_at,
        metadata=job.metadata,
        input_file=job.input_file,
    )
