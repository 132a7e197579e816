"""What leaves for one client: gathered over a turn of the event loop, then written at once."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

FRAME = struct.Struct(">BHBBI")
"""A frame's header: 24 bits of length, type, flags, stream."""
DATA, HEADERS = 0, 1
END_STREAM, END_HEADERS = 1, 4


class Outgoing:
    """Bytes in their order.

    Args:
        write: takes what has gathered.
        said: called when that was something of a call, and not of the connection alone.
    """

    def __init__(self, write: Callable[[bytes], None], said: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._write, self._said = write, said
        self._parts: list[bytes] = []
        self._scheduled = False
        self.answered = False
        """Something of a call is among it."""

    def put(self, data: bytes) -> None:
        """Whole frames."""
        self._parts.append(data)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._end_turn)

    def frame(self, stream_id: int, data: bytes, kind: int = DATA, flags: int = 0) -> None:
        """One of a call."""
        size = len(data)
        self._parts.append(FRAME.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id))
        self.answered = True
        self.put(data)

    def _end_turn(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Now, and not at the end of the turn."""
        if not self._parts:
            return
        parts, self._parts = self._parts, []
        if self.answered:
            self.answered = False
            self._said()
        self._write(b"".join(parts))
