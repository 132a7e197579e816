"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
import re
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from cluster.errors import InvalidRequest, NotFound, Overloaded
from router.refusal import shown

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    410: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_FIELDS = {
    "idempotency_key": "Idempotency-Key",
    "slo_class": "X-Slo-Class",
    "priority": "X-Priority",
    "targets.ttft_seconds": "X-Ttft-Target-Seconds",
    "targets.tpot_seconds": "X-Tpot-Target-Seconds",
    "text": "prompt",
    "token_ids": "prompt",
    "chat": "messages",
    "guide.json_schema": "response_format",
    "guide.json_object": "response_format",
    "guide.regex": "structured_outputs",
    "guide.grammar": "structured_outputs",
    "guide.choice": "structured_outputs",
}
_UNION_TAGS = re.compile(r"str|int|float|bool|TextPart|(list|dict)\[.*")
"""What stands in a path for the kind of a value, beside the names of fields."""


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The HTTP status and body that `error` becomes."""
    status, message = shown(error)
    param = code = None
    if isinstance(error, InvalidRequest) and error.field:
        param = http_field(error.field)
        message = param + message.removeprefix(error.field)
    elif isinstance(error, NotFound) and message.startswith("model"):
        param, code = "model", "model_not_found"
    code = code or status.name.lower()
    return status.http_status, error_body(status.http_status, message, param, code)


def response_of(error: BaseException) -> web.Response:
    """The response that `error` becomes."""
    status, body = body_of(error)
    response = web.json_response(body, status=status)
    if isinstance(error, Overloaded):
        response.headers["Retry-After"] = str(math.ceil(error.retry_after_seconds))
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def http_field(field: str) -> str:
    """A field of pdserve.v1 under the name that HTTP callers know it by."""
    name = field.removeprefix("sampling.")
    if name.startswith("chat.messages"):
        return name.removeprefix("chat.")
    return _FIELDS.get(name, name)


def refuse_body(error: ValidationError) -> InvalidRequest:
    """What is wrong with a body, naming the first field that is."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest("", f"the body is not JSON: {first['msg']}")
    path = ".".join(
        str(part)
        for part in first["loc"]
        if isinstance(part, int) or not _UNION_TAGS.fullmatch(part)
    )
    if first["type"] == "extra_forbidden":
        return InvalidRequest(path[:100], "is not a field that this server takes")
    if first["type"] == "none_required":
        return InvalidRequest(path[:100], "is not supported")
    if first["type"] == "missing":
        return InvalidRequest(path, "is required")
    return InvalidRequest(path[:100], first["msg"][:1].lower() + first["msg"][1:])
