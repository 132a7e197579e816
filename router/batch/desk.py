"""Where batch jobs and files are handed in and collected, whichever protocol it comes by."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.config_clients import BatchConfig
from cluster.errors import InvalidRequest, NotFound, PermissionDenied
from cluster.store.batch_records import BatchJob
from cluster.store.batches import Batches
from cluster.store.files import FileRecord, Files
from router.admission.offers import SloClass
from router.batch import lines
from router.tenants import Tenant

MAX_METADATA, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512
MAX_LIST = 100
RESULTS_A_READ = 200
POLL_SECONDS = 0.2
OUTPUT_SUFFIX, ERRORS_SUFFIX = "-output", "-errors"


@dataclass(frozen=True)
class Found:
    """A file that can be read: uploaded, or the results of a job."""

    record: FileRecord
    job: BatchJob | None = None
    failed: bool = False


class BatchDesk:
    """A tenant's jobs and files.

    Args:
        submitted: called when there is a new job.
    """

    def __init__(
        self,
        config: BatchConfig,
        batches: Batches,
        files: Files,
        clock: Clock,
        submitted: Callable[[], None],
    ) -> None:
        self._config = config
        self._batches = batches
        self._files = files
        self._clock = clock
        self._submitted = submitted

    async def submit(
        self,
        tenant: Tenant,
        endpoint: str,
        raw_lines: list[str],
        metadata: Mapping[str, str],
        input_file: str = "",
    ) -> BatchJob:
        """Takes a job in; its lines are looked at, each that cannot be served has its error then.

        Raises:
            InvalidRequest: the endpoint, the metadata or the number of lines will not do.
            PermissionDenied: the tenant may not ask for batch work.
            Overloaded: the store has no room, or too many of the tenant's jobs have not ended.
        """
        if SloClass.BATCH not in tenant.classes:
            raise PermissionDenied(f"tenant {tenant.name} may not ask for batch work")
        if endpoint not in lines.ENDPOINTS:
            raise InvalidRequest("endpoint", f"must be one of {', '.join(lines.ENDPOINTS)}")
        _check_metadata(metadata)
        if not 0 < len(raw_lines) <= self._config.max_lines:
            raise InvalidRequest(
                "input", f"must have 1 to {self._config.max_lines} lines, not {len(raw_lines)}"
            )
        checked = await asyncio.to_thread(lines.check, raw_lines, endpoint)
        now = self._clock.wall()
        deadline = now + self._config.completion_window_seconds
        job = BatchJob(
            f"batch_{secrets.token_hex(12)}",
            tenant.name,
            endpoint,
            "in_progress",
            len(raw_lines),
            now,
            deadline,
            input_file,
            metadata=dict(metadata),
        )
        job = await self._batches.add(job, checked.lines, checked.errors, tenant.batch_jobs)
        self._submitted()
        return job

    async def submit_file(
        self, tenant: Tenant, endpoint: str, file_id: str, metadata: Mapping[str, str]
    ) -> BatchJob:
        """As `submit`, with the lines of an uploaded file: the job has a copy of its own."""
        if await self._files.get(tenant.name, file_id) is None:
            raise InvalidRequest("input_file_id", "is no file of yours")
        raw_lines = await self._files.lines(tenant.name, file_id)
        return await self.submit(tenant, endpoint, raw_lines, metadata, file_id)

    async def get(self, tenant: Tenant, batch_id: str) -> BatchJob:
        """Raises NotFound."""
        job = await self._batches.get(tenant.name, batch_id)
        if job is None:
            raise NotFound(f"batch_id: there is no batch {batch_id[:100]}")
        return job

    async def latest(self, tenant: Tenant, limit: int, after: str) -> list[BatchJob]:
        """Newest first. Raises InvalidRequest."""
        if not 0 < limit <= MAX_LIST:
            raise InvalidRequest("limit", f"must be 1 to {MAX_LIST}, not {limit}")
        return await self._batches.latest(tenant.name, limit, after)

    async def cancel(self, tenant: Tenant, batch_id: str) -> BatchJob:
        """The job, which ends soon; one that has ended stays as it is. Raises NotFound."""
        job = await self.get(tenant, batch_id)
        await self._batches.cancel(job)
        return await self.get(tenant, batch_id)

    async def results(self, job: BatchJob, failed: bool) -> AsyncIterator[list[str]]:
        """Those that are there."""
        start = 0
        while batch := await self._batches.results(job, failed, start, RESULTS_A_READ):
            start += len(batch)
            yield batch

    async def follow(
        self, tenant: Tenant, batch_id: str, wait: bool
    ) -> AsyncIterator[tuple[str, bool]]:
        """Results and whether they failed; with `wait` until the job has ended. Raises NotFound."""
        positions = {False: 0, True: 0}
        while True:
            # The state comes first: what is written before the end is then read after it.
            job = await self.get(tenant, batch_id)
            more = False
            for failed, start in positions.items():
                batch = await self._batches.results(job, failed, start, RESULTS_A_READ)
                positions[failed] += len(batch)
                more = more or bool(batch)
                for result in batch:
                    yield result, failed
            if not more:
                if job.ended or not wait:
                    return
                await asyncio.sleep(POLL_SECONDS)

    async def upload(
        self, tenant: Tenant, filename: str, purpose: str, content: bytes
    ) -> FileRecord:
        """Keeps a file. Raises InvalidRequest, Overloaded."""
        if purpose != "batch":
            raise InvalidRequest("purpose", "must be batch")
        raw_lines = await asyncio.to_thread(lines.split, content)
        if not raw_lines:
            raise InvalidRequest("file", "has no lines")
        file_id = f"file-{secrets.token_hex(12)}"
        name = filename[:256] or "input.jsonl"
        record = FileRecord(file_id, name, purpose, len(content), self._clock.wall())
        await self._files.add(tenant.name, record, raw_lines)
        return record

    async def files(self, tenant: Tenant) -> list[FileRecord]:
        """Uploaded ones, newest first."""
        return await self._files.latest(tenant.name, MAX_LIST)

    async def file(self, tenant: Tenant, file_id: str) -> Found:
        """Raises NotFound."""
        if record := await self._files.get(tenant.name, file_id):
            return Found(record)
        for suffix, failed in ((OUTPUT_SUFFIX, False), (ERRORS_SUFFIX, True)):
            batch_id = file_id.removesuffix(suffix)
            if batch_id != file_id and (job := await self._batches.get(tenant.name, batch_id)):
                record = FileRecord(
                    file_id, f"{file_id}.jsonl", "batch_output", 0, job.ended_at or job.created_at
                )
                return Found(record, job, failed)
        raise NotFound(f"file_id: there is no file {file_id[:100]}")

    async def content(self, tenant: Tenant, found: Found) -> AsyncIterator[list[str]]:
        """Its lines, some at a time."""
        if found.job is not None:
            async for batch in self.results(found.job, found.failed):
                yield batch
            return
        start = 0
        file_id = found.record.file_id
        while batch := await self._files.lines(tenant.name, file_id, start, RESULTS_A_READ):
            start += len(batch)
            yield batch

    async def delete(self, tenant: Tenant, file_id: str) -> None:
        """Jobs that were made from it go on. Raises NotFound."""
        if await self._files.delete(tenant.name, file_id) is None:
            raise NotFound(f"file_id: there is no file {file_id[:100]} that can be deleted")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest("metadata", f"must have at most {MAX_METADATA} entries")
    for key, value in metadata.items():
        if not 0 < len(key) <= MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
            raise InvalidRequest(
                "metadata",
                f"keys must have 1 to {MAX_KEY_CHARS} characters, values {MAX_VALUE_CHARS} at most",
            )
