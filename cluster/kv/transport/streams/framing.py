"""Bytes of a connection into frames: those of DATA piecemeal, all others whole."""

from __future__ import annotations

from typing import Protocol

from cluster.kv.transport.streams.protocol import (
    DATA,
    END_STREAM,
    HEADER_BYTES,
    PADDED,
    frame_header,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_CONTROL_BYTES = 64 << 10
"""No frame but DATA may be longer."""


class Frames(Protocol):
    """What is done with them. Each raises ValueError for a frame that may not come."""

    def control(self, frame: bytes) -> None:
        """A whole frame that is not DATA, or a client's preface."""
        ...

    def begin_data(self, stream_id: int) -> None:
        """A DATA frame begins."""
        ...

    def data(self, data: memoryview) -> int:
        """Some of it; returns how much of it is taken: none while nobody takes it."""
        ...

    def end_data(self, stream_id: int, last: bool) -> None:
        """The DATA frame is over; `last`: so is the stream."""
        ...


class Framing:
    """Finds the frames.

    Args:
        preface: a client's comes first.

    Attributes:
        data_left: bytes of a DATA frame that have not come.
    """

    def __init__(self, frames: Frames, preface: bool) -> None:
        self._frames = frames
        self._gathered = bytearray()
        self._preface = preface
        self._stream_id = 0
        self._last = False
        self.data_left = 0

    def feed(self, data: memoryview) -> memoryview:
        """Takes bytes as they came; returns those that nobody takes yet, all of a DATA frame.

        Raises:
            ValueError: they are not HTTP/2.
        """
        while len(data):
            if self.data_left:
                used = self._frames.data(data[: self.data_left])
                if not used:
                    return data
                data = data[used:]
                self.came(used)
            elif self._preface:
                data = self._begin(data)
            else:
                data = self._frame(data)
        return data

    def came(self, size: int) -> None:
        """So many bytes of the DATA frame have been taken."""
        self.data_left -= size
        if not self.data_left:
            self._frames.end_data(self._stream_id, self._last)

    def _begin(self, data: memoryview) -> memoryview:
        due = len(PREFACE) - len(self._gathered)
        self._gathered += data[:due]
        if not PREFACE.startswith(self._gathered):
            raise ValueError("no preface")
        if len(self._gathered) == len(PREFACE):
            self._preface = False
            self._whole()
        return data[due:]

    def _frame(self, data: memoryview) -> memoryview:
        if (due := HEADER_BYTES - len(self._gathered)) > 0:
            self._gathered += data[:due]
            data = data[due:]
            if len(self._gathered) < HEADER_BYTES:
                return data
        length, kind, flags, stream_id = frame_header(self._gathered[:HEADER_BYTES])
        if kind == DATA:
            self._gathered.clear()
            self._begin_data(length, flags, stream_id)
            return data
        if length > MAX_CONTROL_BYTES:
            raise ValueError("a frame is too long")
        due = HEADER_BYTES + length - len(self._gathered)
        self._gathered += data[:due]
        if len(self._gathered) == HEADER_BYTES + length:
            self._whole()
        return data[due:]

    def _whole(self) -> None:
        frame = bytes(self._gathered)
        self._gathered.clear()
        self._frames.control(frame)

    def _begin_data(self, length: int, flags: int, stream_id: int) -> None:
        if flags & PADDED:
            raise ValueError("padded frames are not taken")
        self._stream_id, self._last = stream_id, bool(flags & END_STREAM)
        self._frames.begin_data(stream_id)
        self.data_left = length
        if not length:
            self._frames.end_data(stream_id, self._last)
