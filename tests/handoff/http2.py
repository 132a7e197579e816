"""The least HTTP/2 that reaches a gRPC method, by hand: for peers that misbehave below messages."""

from __future__ import annotations

import socket
import struct

from cluster.kv.transport.frames import Frame, encode_frame

_DATA, _HEADERS, _SETTINGS, _PING = 0, 1, 4, 6
_INITIAL_WINDOW_SIZE = 4
_END_HEADERS = 4
METHOD = "/pdserve.v1.KvTransfer/Push"


def connect(address: str, window: int | None = None) -> socket.socket:
    """A connection that has shown HTTP/2's preface and its settings: bytes that it takes of a
    stream, among others."""
    port = dial(address)
    settings = b"" if window is None else struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)
    port.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(_SETTINGS, 0, settings))
    return port


def dial(address: str) -> socket.socket:
    """A bare TCP connection."""
    host, _, number = address.rpartition(":")
    return socket.create_connection((host, int(number)), timeout=10)


def stream_headers(stream: int) -> bytes:
    """Opens a call of the Push method."""
    fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", METHOD),
        (":authority", "decode"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)
    return _frame(_HEADERS, stream, block, _END_HEADERS)


def data_frame(stream: int, message: Frame | bytes, claimed: int | None = None) -> bytes:
    """One gRPC message, whose prefix may claim another length."""
    wire = message if isinstance(message, bytes) else encode_frame(message)
    prefix = struct.pack(">BI", 0, len(wire) if claimed is None else claimed)
    return _frame(_DATA, stream, prefix + wire)


def ping() -> bytes:
    """Asks for an answer."""
    return _frame(_PING, 0, bytes(8))


def _frame(kind: int, stream: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(value: str) -> bytes:
    assert len(value) < 127  # longer ones take more than one byte of length
    return bytes((len(value),)) + value.encode()
