"""What leaves on a connection: frames in their order, each message from the memory it lies in."""

from __future__ import annotations

import asyncio
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence

from h2.connection import H2Connection

from cluster.kv.transport.streams.loan import LEND_BYTES, Loan, Porter
from cluster.kv.transport.streams.protocol import data_header
from cluster.kv.transport.streams.reading import Broken
from cluster.kv.transport.streams.stream import Outgoing, Stream
from cluster.kv.transport.streams.views import Views

TURN_BYTES = 8 << 20
"""Sent before others on the loop have their turn."""
CHUNK_BYTES = 512 << 10
"""Sent at once, so that it is still in the processor's cache when its seal looks at it."""
MAX_UNSENT_BYTES = 1 << 20
"""Of what the protocol has to say; a peer that makes it say more and reads nothing is dropped."""
_ZEROS = memoryview(bytes(64 << 10))


class Frame:
    """One HTTP/2 frame on its way.

    Args:
        head: its first bytes.
        part: of `outgoing`'s message, behind them.

    Attributes:
        left: bytes that have not been sent.
    """

    def __init__(
        self, head: bytes, part: Sequence[memoryview] = (), outgoing: Outgoing | None = None
    ) -> None:
        self._head = memoryview(head)
        self._part = Views(part)
        self.outgoing = outgoing

    @property
    def left(self) -> int:
        return len(self._head) + self._part.left

    @property
    def lendable(self) -> bool:
        """Threads may read what has not been sent, and it is worth one."""
        lendable = self.outgoing is not None and self.outgoing.lendable
        return lendable and not self._head and self._part.left >= LEND_BYTES

    def rest(self) -> list[memoryview]:
        """All that has not been sent of the message."""
        return self._part.front(self._part.left)

    def front(self) -> list[memoryview]:
        """What goes to the socket next."""
        if self._head and self.outgoing is not None and self.outgoing.lendable:
            return [self._head]
        part = self._part.front(CHUNK_BYTES)
        return [self._head, *part] if self._head else part

    def sent(self, size: int) -> None:
        """So much of it has been taken."""
        part = self._took(size)
        if self.outgoing is not None:
            self.outgoing.passed(part)

    def carried(self, size: int) -> None:
        """The same, and `outgoing` has seen it pass."""
        self._took(size)

    def _took(self, size: int) -> list[memoryview]:
        if self._head:
            head = min(size, len(self._head))
            self._head = self._head[head:]
            size -= head
        return self._part.take(size)

    def blank(self) -> None:
        """What has not been sent of the pieces leaves as zeros: the peer has to skip something.
        What stands before them, which says how much that is, leaves as it is."""
        start = self._part.take(self.outgoing.plain) if self.outgoing is not None else []
        left, self.outgoing = self._part.left, None
        whole, rest = divmod(left, len(_ZEROS))
        self._part = Views([*start, *[_ZEROS] * whole, _ZEROS[:rest]])


class Sending:
    """Sends as much as the socket takes, at once or when it takes more.

    Args:
        broke: called with the reason when the socket is of no more use.

    Attributes:
        loan: a thread sends to the socket.
    """

    def __init__(
        self, sock: socket.socket, protocol: H2Connection, broke: Callable[[str], None]
    ) -> None:
        self._sock = sock
        self._h2 = protocol
        self._broke = broke
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._queue: deque[Outgoing] = deque()
        self._frame: Frame | None = None
        self._waiting = False
        self._busy = False
        self._over = False
        self._porter = Porter("kv-send")
        self.loan: Loan | None = None

    def say(self, frame: bytes) -> None:
        """A frame that is not DATA, packed by hand; leaves with the next `pump`."""
        self._unsent += frame

    def put(self, outgoing: Outgoing) -> None:
        """Behind what its stream has queued before."""
        self._queue.append(outgoing)
        self.pump()

    def drop(self, outgoing: Outgoing) -> bool:
        """It need not leave any more; False if it has left."""
        if outgoing not in self._queue:
            return False
        self._queue.remove(outgoing)
        self._let_go(outgoing)
        return True

    def _let_go(self, outgoing: Outgoing) -> None:
        """The pieces of a sealed message are read no more. What is left of another goes: it is its
        own, and with zeros in it might mean something."""
        if outgoing.sealing and self._frame is not None and self._frame.outgoing is outgoing:
            if self.loan is None:
                self._frame.blank()
            else:
                self.loan.stop()  # the rest is blank when it is known how much of it there is

    def forget(self, stream: Stream) -> None:
        """Nothing of a stream leaves any more, but for the rest of a frame that has begun."""
        for outgoing in [queued for queued in self._queue if queued.stream is stream]:
            self._queue.remove(outgoing)
            self._let_go(outgoing)
            outgoing.lost(Broken("the stream was closed"))

    def pump(self) -> None:
        """Sends what there is, the protocol's own frames too."""
        if self._busy or self._over:
            return
        self._collect()
        if not self._waiting and not self._over and self.loan is None:
            self._send()

    def _send(self) -> None:
        self._busy = True
        try:
            more = self._send_some()
        except OSError as error:
            more = False
            self._broke(f"the connection broke: {error}")
        finally:
            self._busy = False
        if not self._over:
            self._wait(more)

    def _send_some(self) -> bool:
        """True: there is more. Raises OSError."""
        turn = TURN_BYTES
        while turn > 0 and not self._over:
            frame = self._frame = self._frame or self._next()
            if frame is None:
                return False
            if frame.lendable:
                self._lend(frame)
                return False
            try:
                size = self._sock.sendmsg(frame.front())
            except (BlockingIOError, InterruptedError):
                return True
            frame.sent(size)
            turn -= size
            self._look(frame)
        return True

    def _look(self, frame: Frame) -> None:
        """It may have left."""
        if not frame.left:
            self._frame = None
            self._sent()

    def _lend(self, frame: Frame) -> None:
        """A thread sends the frame, and nothing behind it."""
        assert frame.outgoing is not None
        outgoing = frame.outgoing

        def back(size: int, why: str) -> None:
            self.loan = outgoing.loan = None
            frame.carried(size)
            if why:
                return self._broke(why)
            if loan.stopped:
                frame.blank()
            self._look(frame)
            self.pump()

        self.loan = outgoing.loan = loan = Loan(
            self._sock,
            self._sock.sendmsg,
            select.POLLOUT,
            Views(frame.rest()),
            outgoing.passed,
            back,
        )
        self._porter.take(loan)

    def _wait(self, more: bool) -> None:
        if more and not self._waiting:
            self._loop.add_writer(self._sock, self._send)
        elif not more and self._waiting:
            self._loop.remove_writer(self._sock)
        self._waiting = more

    def _next(self) -> Frame | None:
        """The next frame that may leave."""
        blocked: set[Stream] = set()
        for outgoing in tuple(self._queue):
            if said := self._said():
                return said
            if outgoing.stream in blocked or outgoing not in self._queue:
                continue
            if outgoing.act is not None:
                self._queue.remove(outgoing)
                outgoing.act()
                continue
            flow = outgoing.stream.flow
            room = min(
                self._h2.max_outbound_frame_size,
                self._h2.outbound_flow_control_window,
                flow.outbound_flow_control_window,
            )
            if room > 0:
                part = outgoing.part(room)
                size = sum(map(len, part))
                self._h2.outbound_flow_control_window -= size
                flow.outbound_flow_control_window -= size
                return Frame(data_header(outgoing.stream.id, size), part, outgoing)
            blocked.add(outgoing.stream)
        return self._said()

    def _said(self) -> Frame | None:
        """What the protocol has to say."""
        self._collect()
        if not self._unsent or self._over:
            return None
        said, self._unsent = bytes(self._unsent), bytearray()
        return Frame(said)

    def _collect(self) -> None:
        """Also while the socket takes nothing: a peer may ask on and on, and read no answer."""
        self._unsent += self._h2.data_to_send()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self._broke("the peer reads nothing")

    def _sent(self) -> None:
        """A frame has left: so has, perhaps, the message it was the end of."""
        for outgoing in self._queue:
            if outgoing.act is None and not outgoing.left():
                self._queue.remove(outgoing)
                outgoing.sent()
                return

    def close(self, why: str) -> None:
        """Nothing leaves any more, but for what a thread is at."""
        self._over = True
        if self.loan is not None:
            self.loan.stop()
        if self._waiting:
            self._loop.remove_writer(self._sock)
        for outgoing in self._queue:
            outgoing.lost(Broken(why))
        self._queue.clear()
