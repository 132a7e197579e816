"""`pdserve batch …`: hand jobs in, watch them, fetch results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.cli.access import channel
from cluster.cli.calls import grpc_errors
from cluster.cli.terminal import EXIT_FAILED, EXIT_OK, Terminal
from cluster.errors import InvalidRequest
from pdserve.v1 import batch_pb2, batch_pb2_grpc

CALL_SECONDS = 120.0
CHUNK_BYTES = 256 << 10


@dataclass(frozen=True)
class Job:
    """A job, as it is printed."""

    batch_id: str
    state: str
    endpoint: str
    total: int
    completed: int
    failed: int
    created_at: float
    ended_at: float


def submit(terminal: Terminal, address: str, file: Path, endpoint: str, as_json: bool) -> int:
    """Hands a file of JSON lines in."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidRequest("FILE", f"{file} cannot be read: {error.strerror}") from error

    async def parts() -> AsyncIterator[batch_pb2.SubmitBatchRequest]:
        yield batch_pb2.SubmitBatchRequest(header=batch_pb2.BatchHeader(endpoint=endpoint))
        for start in range(0, len(content), CHUNK_BYTES):
            part = content[start : start + CHUNK_BYTES]
            yield batch_pb2.SubmitBatchRequest(content=part)

    async def call() -> Job:
        async with channel(address) as to:
            with grpc_errors():
                return _job(
                    await batch_pb2_grpc.BatchStub(to).Submit(parts(), timeout=CALL_SECONDS)
                )

    return _show(terminal, [asyncio.run(call())], as_json, one=True)


def get(terminal: Terminal, address: str, batch_id: str, as_json: bool) -> int:
    """Shows a job."""
    request = batch_pb2.GetBatchRequest(batch_id=batch_id)
    return _show(terminal, [_job(_call(address, "Get", request))], as_json, one=True)


def cancel(terminal: Terminal, address: str, batch_id: str, as_json: bool) -> int:
    """Cancels a job."""
    request = batch_pb2.CancelBatchRequest(batch_id=batch_id)
    return _show(terminal, [_job(_call(address, "Cancel", request))], as_json, one=True)


def jobs(terminal: Terminal, address: str, limit: int, as_json: bool) -> int:
    """Lists jobs, newest first."""
    reply = _call(address, "List", batch_pb2.ListBatchesRequest(limit=limit))
    return _show(terminal, list(map(_job, reply.jobs)), as_json, one=False)


def results(terminal: Terminal, address: str, batch_id: str, wait: bool) -> int:
    """Prints results as JSON lines; exits 1 if any line failed."""

    async def call() -> bool:
        failed = False
        request = batch_pb2.BatchResultsRequest(batch_id=batch_id, no_wait=not wait)
        async with channel(address) as to:
            with grpc_errors():
                async for result in batch_pb2_grpc.BatchStub(to).Results(request):
                    terminal.out.file.write(result.json + "\n")
                    failed = failed or result.failed
        return failed

    return EXIT_FAILED if asyncio.run(call()) else EXIT_OK


def _call(address: str, method: str, request: Any) -> Any:
    async def call() -> Any:
        async with channel(address) as to:
            with grpc_errors():
                stub = batch_pb2_grpc.BatchStub(to)
                return await getattr(stub, method)(request, timeout=CALL_SECONDS)

    return asyncio.run(call())


def _job(job: batch_pb2.BatchJob) -> Job:
    return Job(
        job.batch_id,
        job.state,
        job.endpoint,
        job.total,
        job.completed,
        job.failed,
        job.created_at_seconds,
        job.ended_at_seconds,
    )


def _show(terminal: Terminal, found: list[Job], as_json: bool, one: bool) -> int:
    if as_json:
        terminal.json(asdict(found[0]) if one else [asdict(job) for job in found])
        return EXIT_OK
    table = Table(box=None)
    rows = [("batch", "state", "lines", "done", "failed", "created"), *map(_row, found)]
    for column in zip(*rows, strict=True):  # a narrow terminal cuts nothing but the endpoint
        table.add_column(column[0], no_wrap=True, min_width=max(map(len, column)))
    table.add_column("endpoint", no_wrap=True)
    for row, job in zip(rows[1:], found, strict=True):
        table.add_row(*row, job.endpoint)
    terminal.out.print(table)
    return EXIT_OK


def _row(job: Job) -> tuple[str, ...]:
    created = time.strftime("%m-%d %H:%M", time.localtime(job.created_at))
    return job.batch_id, job.state, *map(str, (job.total, job.completed, job.failed)), created
