"""What a call's headers ask for, or why it is refused. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from cluster.rpc.headers import (
    BEGIN,
    CONTENT_TYPE,
    ENCODINGS,
    BadHeaders,
    Headers,
    Metadata,
    metadata,
    timeout_seconds,
    trailers,
)

Methods: TypeAlias = "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"


class Refused(Exception):
    """A stream that is no call.

    Attributes:
        headers: that answer it.
    """

    def __init__(self, headers: Headers) -> None:
        super().__init__(headers)
        self.headers = headers


@dataclass(frozen=True)
class Opening:
    """A call to be.

    Attributes:
        encoding: of its messages that are compressed.
        timeout_seconds: None: it has no deadline.
    """

    method: grpc.RpcMethodHandler[Any, Any]
    encoding: str
    metadata: Metadata
    timeout_seconds: float | None


def opening(pairs: Iterable[tuple[Any, Any]], methods: Methods, metadata_bytes: int) -> Opening:
    """Raises Refused."""
    pairs = [(str(name), str(value)) for name, value in pairs]
    headers = dict(pairs)
    if not _is_grpc(headers.get("content-type", "")):
        raise Refused([(":status", "415")])
    method = methods.get(headers.get(":path", ""))
    if method is None or headers.get(":method") != "POST":
        raise _refused(grpc.StatusCode.UNIMPLEMENTED, "no such method")
    encoding = headers.get("grpc-encoding", "identity")
    if encoding not in ENCODINGS:
        raise _refused(grpc.StatusCode.UNIMPLEMENTED, "no such grpc-encoding")
    # Each counts as HTTP/2 counts it, with 32 bytes for its place in a table.
    if sum(len(name) + len(value) + 32 for name, value in pairs) > metadata_bytes:
        why = f"over {metadata_bytes} bytes of metadata"
        raise _refused(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
    left = headers.get("grpc-timeout")
    try:
        timeout = None if left is None else timeout_seconds(left)
        return Opening(method, encoding, metadata(pairs), timeout)
    except BadHeaders as error:
        raise _refused(grpc.StatusCode.INTERNAL, str(error)) from None


def _refused(code: grpc.StatusCode, why: str) -> Refused:
    return Refused(BEGIN + trailers(code.value[0], why))


def _is_grpc(content_type: str) -> bool:
    more = (CONTENT_TYPE + "+", CONTENT_TYPE + ";")
    return content_type == CONTENT_TYPE or content_type.startswith(more)
