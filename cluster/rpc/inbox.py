"""A call's incoming messages: cut out of the stream, decompressed, none larger than may be."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections import deque
from collections.abc import Callable

PREFIX = struct.Struct(">BI")
_WINDOW_BITS = {"gzip": 31, "deflate": 15}


class BadMessage(Exception):
    """A message that cannot be read.

    Attributes:
        too_large: it is larger than messages may be.
    """

    def __init__(self, message: str, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


class Inbox:
    """Bytes in, messages out.

    What waits is bounded by HTTP/2's flow control: bytes count as received only once their message
    is taken, but for the bytes of a message that is not complete, which has a size limit.

    Args:
        limit: bytes of a message, also after decompression.
        encoding: the call's grpc-encoding.
        received: told of bytes that the peer may send again.
    """

    def __init__(self, limit: int, encoding: str, received: Callable[[int], None]) -> None:
        self._limit = limit
        self._encoding = encoding
        self._received = received
        self._bytes = bytearray()
        self._held = 0
        self._messages: deque[tuple[int, bytes, int]] = deque()
        self._filled = asyncio.Event()
        self.ended = False
        """The peer sends nothing more."""

    @property
    def waiting(self) -> int:
        """Messages that are complete and not taken."""
        return len(self._messages)

    def feed(self, data: bytes, flow: int) -> None:
        """Bytes of a DATA frame, which counts as `flow` bytes. Raises BadMessage."""
        if not self._bytes and len(data) >= PREFIX.size:
            packed, size = PREFIX.unpack_from(data)
            if PREFIX.size + size == len(data) and size <= self._limit:  # As almost all are.
                self._messages.append((packed, data[PREFIX.size :], flow))
                self._filled.set()
                return
        self._bytes += data
        self._held += flow
        while len(self._bytes) >= PREFIX.size:
            packed, size = PREFIX.unpack_from(self._bytes)
            if size > self._limit:
                raise BadMessage(
                    f"received a message of {size} bytes, of {self._limit} at most", True
                )
            end = PREFIX.size + size
            if len(self._bytes) < end:
                break
            message = bytes(self._bytes[PREFIX.size : end])
            del self._bytes[:end]
            self._messages.append((packed, message, self._held))
            self._held = 0
            self._filled.set()
        if self._held:  # Of a message that is still coming: its size limit bounds it.
            self._received(self._held)
            self._held = 0

    def end(self) -> None:
        """The peer has sent all of it. Raises BadMessage if that ends within a message."""
        self.ended = True
        self._filled.set()
        if self._bytes:
            raise BadMessage("the stream ended within a message")

    def take(self) -> bytes:
        """The next message that waits."""
        packed, message, flow = self._messages.popleft()
        if flow:
            self._received(flow)
        return self._unpacked(packed, message) if packed else message

    def drop(self) -> None:
        """Nobody takes what waits: its bytes may come again, of other calls."""
        flow = self._held + sum(flow for _, _, flow in self._messages)
        self._messages.clear()
        self._bytes.clear()
        self._held = 0
        if flow:
            self._received(flow)

    async def next(self) -> bytes | None:
        """The next message, None after the last."""
        while not self._messages:
            if self.ended:
                return None
            self._filled.clear()
            await self._filled.wait()
        return self.take()

    def _unpacked(self, packed: int, message: bytes) -> bytes:
        bits = _WINDOW_BITS.get(self._encoding)
        if packed != 1 or bits is None:
            raise BadMessage("a message is compressed and its call does not say how")
        unpacker = zlib.decompressobj(bits)
        try:
            plain = unpacker.decompress(message, self._limit + 1)
        except zlib.error:
            raise BadMessage("a message could not be decompressed") from None
        if len(plain) > self._limit:
            raise BadMessage(f"received a message of over {self._limit} bytes", True)
        if not unpacker.eof:
            raise BadMessage("a message could not be decompressed")
        return plain
