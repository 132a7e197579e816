"""Metadata, deadlines and statuses as gRPC writes them into HTTP/2 headers."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence

from hpack import Encoder, NeverIndexedHeaderTuple

Metadata = tuple[tuple[str, str | bytes], ...]
Headers = list[tuple[str, str]]

CONTENT_TYPE = "application/grpc"
ENCODINGS = ("identity", "deflate", "gzip")
BEGIN: Headers = [
    (":status", "200"),
    ("content-type", CONTENT_TYPE),
    ("grpc-accept-encoding", ",".join(ENCODINGS)),
]

_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_RESERVED = frozenset(("content-type", "te", "user-agent", "host"))


class BadHeaders(Exception):
    """A call's headers are not gRPC's."""


def timeout_seconds(value: str) -> float:
    """Of a grpc-timeout header. Raises BadHeaders."""
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise BadHeaders(f"grpc-timeout is no time: {value[:40]!r}")
    return int(match[1]) * _UNITS[match[2]]


def metadata(headers: Iterable[tuple[str, str]]) -> Metadata:
    """The caller's own; values of names that end with -bin are bytes. Raises BadHeaders."""
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        if name.startswith((":", "grpc-")) or name in _RESERVED:
            continue
        if name.endswith("-bin"):
            found += ((name, binary(name, part)) for part in value.split(","))
        else:
            found.append((name, value))
    return tuple(found)


def request(
    authority: str, path: str, more: Sequence[tuple[str, str]], scheme: str = "http"
) -> Headers:
    """A call's, with the caller's metadata behind them."""
    return [
        (":method", "POST"),
        (":scheme", scheme),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", CONTENT_TYPE),
        *more,
    ]


def trailers(code: int, message: str, extra: Sequence[tuple[str, str | bytes]] = ()) -> Headers:
    """A status, its message percent-encoded, and the metadata that goes with it."""
    ends: Headers = [("grpc-status", str(code))]
    if message:
        ends.append(("grpc-message", _percent(message)))
    for name, value in extra:
        text = value if isinstance(value, str) else base64.b64encode(value).decode().rstrip("=")
        ends.append((name, text))
    return ends


OK: Headers = trailers(0, "")


def _packed(headers: Headers) -> bytes:
    """As HPACK, in a form that is the same on every connection at any time: nothing of it is kept
    in a table."""
    never_kept = [NeverIndexedHeaderTuple(name, value) for name, value in headers]
    return bytes(Encoder().encode(never_kept, huffman=False))


BEGIN_PACKED, OK_PACKED = _packed(BEGIN), _packed(OK)


def binary(name: str, value: str) -> bytes:
    """Of a header whose name ends with -bin. Raises BadHeaders."""
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadHeaders(f"{name} is not base64") from None


def _percent(message: str) -> str:
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}"
        for byte in message.encode(errors="replace")
    )
