"""h2's side of a connection, and the frames that are packed by hand.

h2 keeps the protocol's state and sees every frame but DATA, whose payloads it would copy. Their
flow control is counted here.
"""

from __future__ import annotations

import struct

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings

HEADER_BYTES = 9
DATA, WINDOW_UPDATE = 0, 8
END_STREAM, PADDED = 1, 8
MAX_FRAME_BYTES = (1 << 24) - 1
WINDOW_BYTES = (1 << 31) - 1
"""Of a stream and of a connection: what holds a sender back is that nobody reads its socket."""
REPLENISH_BYTES = 256 << 20
PREFIX = struct.Struct(">BI")
"""Before each gRPC message: whether it is compressed, and its length."""

_FRAME = struct.Struct(">BHBBI")
_INCREMENT = struct.Struct(">BHBBII")
Headers = list[tuple[str, str]]


def open_protocol(client: bool, max_streams: int) -> H2Connection:
    """Before the connection begins.

    Args:
        max_streams: that the peer may have open.
    """
    protocol = H2Connection(
        H2Configuration(
            client_side=client,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
    )
    protocol.local_settings = Settings(
        client=client,
        initial_values={
            SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
            SettingCodes.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
            SettingCodes.MAX_HEADER_LIST_SIZE: 16 << 10,
            SettingCodes.ENABLE_PUSH: 0,
        },
    )
    protocol.initiate_connection()
    return protocol


def frame_header(data: bytes | bytearray) -> tuple[int, int, int, int]:
    """Length, type, flags and stream of a frame."""
    high, low, kind, flags, stream_id = _FRAME.unpack(data)
    return high << 16 | low, kind, flags, stream_id & 0x7FFFFFFF


def data_header(stream_id: int, size: int, flags: int = 0) -> bytes:
    """Of a DATA frame."""
    return _FRAME.pack(size >> 16, size & 0xFFFF, DATA, flags, stream_id)


def window_update(stream_id: int, size: int) -> bytes:
    """The peer may send so many bytes more; stream 0: on the connection."""
    return _INCREMENT.pack(0, 4, WINDOW_UPDATE, 0, stream_id, size)


def request(authority: str, path: str) -> Headers:
    """The headers of a call."""
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]


BEGIN: Headers = [(":status", "200"), ("content-type", "application/grpc")]


def trailers(status: int, message: str) -> Headers:
    """The end of a call; the message is of printable ASCII without %."""
    return [("grpc-status", str(status)), *([("grpc-message", message)] if message else [])]
