"""What comes on a connection: from the socket to its place, or into messages."""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from h2.exceptions import ProtocolError

from cluster.kv.transport.streams.framing import Frames, Framing
from cluster.kv.transport.streams.loan import LEND_BYTES, Loan, Porter
from cluster.kv.transport.streams.reading import Incoming
from cluster.kv.transport.streams.views import Views

log = logging.getLogger(__name__)

TURN_BYTES = 8 << 20
"""Read before others on the loop have their turn."""
CHUNK_BYTES = 512 << 10
"""Read to its place at once, so that it is still in the processor's cache when it is looked at."""
SCRATCH_BYTES = 64 << 10


class _Scratch(threading.local):
    """A loop's memory for what has no place of its own, emptied in the turn in which it was
    filled."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(SCRATCH_BYTES))


_scratch = _Scratch()


class Taker(Frames, Protocol):
    """Takes what comes."""

    def coming(self) -> Incoming | None:
        """The long message that the DATA frame under way is part of."""
        ...

    def count(self, size: int) -> None:
        """So many bytes of the DATA frame went straight to their place."""
        ...

    def fed(self) -> None:
        """What was to be taken in this turn has been: answers may leave."""
        ...


class Receiving:
    """Reads as long as what comes is taken; the rest stays in the socket.

    Args:
        preface: a client's comes first.
        broke: called with the reason when the socket is of no more use.

    Attributes:
        loan: a thread reads from the socket.
    """

    def __init__(
        self, sock: socket.socket, taker: Taker, preface: bool, broke: Callable[[str], None]
    ) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._taker = taker
        self._framing = Framing(taker, preface)
        self._broke = broke
        self._held = b""
        self._reading = False
        self._over = False
        self._porter = Porter("kv-receive")
        self.loan: Loan | None = None

    def start(self) -> None:
        """Reads from now on."""
        if not self._reading and not self._over and self.loan is None:
            self._reading = True
            self._loop.add_reader(self._sock, self._readable)

    def go_on(self) -> None:
        """What could not be taken before can perhaps be now. Not in this turn: it may be asked for
        in the middle of one."""
        if not self._reading and not self._over:
            self._loop.call_soon(self._take_held)

    def close(self) -> None:
        """Reads no more, but for what a thread is at."""
        self._over = True
        if self.loan is not None:
            self.loan.stop()
        self._stop_reading()

    def _take_held(self) -> None:
        if not self._reading and not self._over and self.loan is None:
            held, self._held = self._held, b""
            self.start()
            self._feed(memoryview(held))

    def _readable(self) -> None:
        turn = TURN_BYTES
        while turn > 0 and self._reading:
            try:
                turn -= self._read()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                return self._broke(f"the connection broke: {error}")

    def _read(self) -> int:
        """One system call; returns the bytes that came."""
        coming = self._taker.coming() if self._framing.data_left else None
        room: list[memoryview] = []
        more = 0
        if coming is not None and coming.left:
            more = min(coming.left, self._framing.data_left)
            if coming.lendable and more >= LEND_BYTES:
                self._lend(coming, coming.room(more))
                return 0
            room = coming.room(min(more, CHUNK_BYTES))
        held = sum(map(len, room))
        scratch = _scratch.memory
        into = room if 0 < held < more else [*room, scratch]
        size = int(self._sock.recvmsg_into(into)[0])
        if not size:
            self._broke("the peer closed the connection")
            return 1
        placed = min(size, held)
        if placed and coming is not None:
            coming.filled(placed)
            self._taker.count(placed)
        if 0 < placed == size < self._framing.data_left:
            self._framing.came(placed)  # the same frame goes on: there is nothing to answer
        else:
            self._feed(scratch[: size - placed], placed)
        return size

    def _lend(self, coming: Incoming, room: list[memoryview]) -> None:
        """A thread reads what goes there, and nothing behind it."""

        def back(size: int, why: str) -> None:
            self.loan = coming.loan = None
            if self._over:
                return
            coming.moved(size)
            self._taker.count(size)
            if why:
                return self._broke(why)
            self.start()
            self._feed(memoryview(b""), size)

        self._stop_reading()
        self.loan = coming.loan = Loan(
            self._sock,
            lambda pieces: self._sock.recvmsg_into(pieces)[0],
            select.POLLIN,
            Views(room),
            coming.landed,
            back,
        )
        self._porter.take(self.loan)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def _feed(self, data: memoryview, placed: int = 0) -> None:
        try:
            if placed:
                self._framing.came(placed)
            left = self._framing.feed(data)
        except (ProtocolError, UnicodeDecodeError, ValueError) as error:
            log.debug("a peer broke HTTP/2: %s", error)
            self._taker.fed()  # what h2 has to say of it
            return self._broke("the peer broke the protocol")
        if len(left) and not self._over:
            self._held = bytes(left)
            self._stop_reading()
        self._taker.fed()
