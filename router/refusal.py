"""How errors reach clients: gRPC statuses with google.rpc details. Nothing internal gets out."""

from __future__ import annotations

import functools
import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from cluster.errors import InvalidRequest, Overloaded, PdserveError, Status, status_of
from cluster.rpc.call import Call

MAX_MESSAGE_CHARS = 1000
_DETAILS_KEY = "grpc-status-details-bin"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

S = TypeVar("S")
R = TypeVar("R")

log = logging.getLogger(__name__)


def shown(error: BaseException) -> tuple[Status, str]:
    """The status and the text that a client gets; what is internal is logged under a reference."""
    status = status_of(error)
    if isinstance(error, PdserveError) and status.name != "INTERNAL":
        return status, error.message[:MAX_MESSAGE_CHARS]
    reference = secrets.token_hex(6)
    log.error("internal error, reference %s", reference, exc_info=error)
    return status, f"internal error, reference {reference}"


async def refuse(call: Call, error: BaseException) -> None:
    """Ends the call with the status of `error`; raises, as grpc's abort does."""
    status, message = shown(error)
    rich = status_pb2.Status(code=status.grpc_code, message=message)
    for detail in _details(error):
        rich.details.add().Pack(detail)
    trailing = ((_DETAILS_KEY, rich.SerializeToString()),) if rich.details else ()
    await call.abort(_CODES[status.grpc_code], message, trailing)


def _details(error: BaseException) -> list[Message]:
    if isinstance(error, InvalidRequest) and error.field:
        bad_request = error_details_pb2.BadRequest()
        description = error.message.removeprefix(f"{error.field}: ")
        bad_request.field_violations.add(
            field=error.field, description=description[:MAX_MESSAGE_CHARS]
        )
        return [bad_request]
    if isinstance(error, Overloaded):
        retry_info = error_details_pb2.RetryInfo()
        fraction, whole = math.modf(max(0.0, error.retry_after_seconds))
        retry_info.retry_delay.seconds = int(whole)
        retry_info.retry_delay.nanos = int(fraction * 1e9)
        return [retry_info]
    return []


def refusing(
    method: Callable[[S, Any, Any], Awaitable[R]],
) -> Callable[[S, Any, Any], Awaitable[R]]:
    """A servicer method whose errors become statuses."""

    @functools.wraps(method)
    async def wrapped(self: S, request: Any, call: Call) -> R:
        try:
            return await method(self, request, call)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await refuse(call, error)
            raise

    return wrapped
