"""OpenAI's /v1/files and /v1/batches."""

from __future__ import annotations

from typing import Any, Literal

from aiohttp import BodyPartReader, web
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import InvalidRequest
from cluster.store.batch_records import BatchJob
from cluster.store.files import FileRecord
from router.batch.desk import ERRORS_SUFFIX, OUTPUT_SUFFIX, BatchDesk
from router.http.failures import refuse_body
from router.http.headers import shown_by
from router.tenants import Tenant, Tenants

_CHUNK = 256 << 10


class BatchBody(BaseModel):
    """POST /v1/batches."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, str] | None = None


class BatchHandlers:
    """Files and batches of a tenant.

    Args:
        max_bytes: of an uploaded file.
    """

    def __init__(self, desk: BatchDesk, tenants: Tenants, max_bytes: int) -> None:
        self._desk = desk
        self._tenants = tenants
        self._max_bytes = max_bytes

    @property
    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/files", self.upload),
            web.get("/v1/files", self.files),
            web.get("/v1/files/{id}", self.file),
            web.delete("/v1/files/{id}", self.delete),
            web.get("/v1/files/{id}/content", self.content),
            web.post("/v1/batches", self.create),
            web.get("/v1/batches", self.batches),
            web.get("/v1/batches/{id}", self.batch),
            web.post("/v1/batches/{id}/cancel", self.cancel),
        ]

    async def upload(self, request: web.Request) -> web.Response:
        tenant = self._tenant(request)
        if request.content_type != "multipart/form-data":
            raise InvalidRequest("", "the body must be multipart/form-data with file and purpose")
        filename, purpose, content = "", "", None
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                raise InvalidRequest("", "parts within parts are not taken")
            if part.name == "file":
                filename = part.filename or ""
                content = await self._read(part)
            elif part.name == "purpose":
                purpose = (await self._read(part)).decode(errors="replace")
            elif part.name not in ("expires_after[anchor]", "expires_after[seconds]"):
                raise InvalidRequest(str(part.name)[:100], "is not a field that this server takes")
        if content is None:
            raise InvalidRequest("file", "is required")
        return web.json_response(_file(await self._desk.upload(tenant, filename, purpose, content)))

    async def files(self, request: web.Request) -> web.Response:
        files = await self._desk.files(self._tenant(request))
        return web.json_response({"object": "list", "data": list(map(_file, files))})

    async def file(self, request: web.Request) -> web.Response:
        found = await self._desk.file(self._tenant(request), request.match_info["id"])
        return web.json_response(_file(found.record))

    async def delete(self, request: web.Request) -> web.Response:
        file_id = request.match_info["id"]
        await self._desk.delete(self._tenant(request), file_id)
        return web.json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        tenant = self._tenant(request)
        found = await self._desk.file(tenant, request.match_info["id"])
        response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        await response.prepare(request)
        async for lines in self._desk.content(tenant, found):
            await response.write(("\n".join(lines) + "\n").encode())
        await response.write_eof()
        return response

    async def create(self, request: web.Request) -> web.Response:
        tenant = self._tenant(request)
        try:
            body = BatchBody.model_validate_json(await request.read())
        except ValidationError as error:
            raise refuse_body(error) from None
        job = await self._desk.submit_file(
            tenant, body.endpoint, body.input_file_id, body.metadata or {}
        )
        return web.json_response(_batch(job))

    async def batches(self, request: web.Request) -> web.Response:
        limit = request.query.get("limit", "20")
        if not limit.isdecimal() or len(limit) > 4:
            raise InvalidRequest("limit", "must be a number")
        after = request.query.get("after", "")
        jobs = await self._desk.latest(self._tenant(request), int(limit), after)
        data = list(map(_batch, jobs))
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        more = len(jobs) == int(limit)
        return web.json_response({"object": "list", "data": data, "has_more": more, **ends})

    async def batch(self, request: web.Request) -> web.Response:
        job = await self._desk.get(self._tenant(request), request.match_info["id"])
        return web.json_response(_batch(job))

    async def cancel(self, request: web.Request) -> web.Response:
        job = await self._desk.cancel(self._tenant(request), request.match_info["id"])
        return web.json_response(_batch(job))

    async def _read(self, part: BodyPartReader) -> bytes:
        content = bytearray()
        while chunk := await part.read_chunk(_CHUNK):
            content += chunk
            if len(content) > self._max_bytes:
                raise InvalidRequest("file", f"must be at most {self._max_bytes} bytes")
        return bytes(content)

    def _tenant(self, request: web.Request) -> Tenant:
        return self._tenants.identify(shown_by(request))


def _file(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.file_id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created_at),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }


def _batch(job: BatchJob) -> dict[str, Any]:
    ended = {job.state: int(job.ended_at)} if job.ended else {}
    return {
        "id": job.batch_id,
        "object": "batch",
        "endpoint": job.endpoint,
        "errors": None,
        "input_file_id": job.input_file,
        "completion_window": "24h",
        "status": job.state,
        "output_file_id": job.batch_id + OUTPUT_SUFFIX if job.completed else None,
        "error_file_id": job.batch_id + ERRORS_SUFFIX if job.failed else None,
        "created_at": int(job.created_at),
        "in_progress_at": int(job.created_at),
        "expires_at": int(job.deadline_at),
        "completed_at": ended.get("completed"),
        "expired_at": ended.get("expired"),
        "cancelled_at": ended.get("cancelled"),
        "request_counts": {
            "total": job.total,
            "completed": job.completed,
            "failed": job.failed,
        },
        "metadata": job.metadata or None,
    }
