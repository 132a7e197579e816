"""What leaves for one client: gathered over a turn of the event loop, then written at once."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

FRAME = struct.Struct(">BHBBI")
"""A frame's header: 24 bits of length, type, flags, stream."""
MESSAGE = struct.Struct(">BHBBIBI")
"""The same, of DATA, and what stands before a message: whether it is packed, and its length."""
PREFIX_SIZE = MESSAGE.size - FRAME.size
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
            self._loop.call_soon(self.flush)

    def frame(self, stream_id: int, data: bytes, kind: int = DATA, flags: int = 0) -> None:
        """One of a call."""
        size = len(data)
        self._parts.append(FRAME.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id))
        self.answered = True
        self.put(data)

    def message(self, stream_id: int, message: bytes) -> None:
        """A call's message as one DATA frame; in one step, because a token is one."""
        length = len(message)
        size = length + PREFIX_SIZE
        head = MESSAGE.pack(size >> 16, size & 0xFFFF, DATA, 0, stream_id, 0, length)
        self._parts += (head, message)
        self.answered = True
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Now, and not at the end of the turn."""
        self._scheduled = False
        if not self._parts:
            return
        parts, self._parts = self._parts, []
        if self.answered:
            self.answered = False
            self._said()
        self._write(b"".join(parts))
