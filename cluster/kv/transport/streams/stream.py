"""One call, from either end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cluster.kv.transport.streams.loan import Loan
from cluster.kv.transport.streams.protocol import PREFIX
from cluster.kv.transport.streams.reading import Broken, Incoming, Message, Reader
from cluster.kv.transport.streams.views import Views

if TYPE_CHECKING:
    from cluster.kv.transport.streams.connection import Connection


class Stream:
    """Messages out and in. Made by a connection.

    Args:
        id: HTTP/2's.
        flow: h2's object, which knows the peer's window.

    Attributes:
        over: it has ended on this side.
        peer_over: the peer has ended it, or it is lost.
    """

    def __init__(self, connection: Connection, id: int, flow: Any, reader: Reader) -> None:
        self._connection = connection
        self.id = id
        self.flow = flow
        self.reader = reader
        self.over = False
        self.peer_over = False
        self.uncounted = 0
        """Bytes that came and have not been given back to the peer's window."""
        self._ended: list[Callable[[], None]] = []

    async def send(self, *pieces: bytes | memoryview) -> None:
        """Sends one message from the memory it lies in; returns when the socket has it all. If that
        is broken off, the memory may still be read for a frame that has begun.

        Raises:
            Broken: the stream is gone.
        """
        if self.over:
            raise Broken("the stream has ended")
        views = [piece if isinstance(piece, memoryview) else memoryview(piece) for piece in pieces]
        prefix = PREFIX.pack(0, sum(map(len, views)))
        await self._connection.send(Outgoing(self, Views([memoryview(prefix), *views])))

    async def send_sealed(
        self, head: bytes, pieces: Sequence[memoryview], seal: Seal, lendable: bool = False
    ) -> None:
        """The same with an end that is made of the pieces while they leave. However it ends, the
        pieces are read no more.

        Args:
            head: before the pieces; none of the seal's.
            lendable: the pieces are the caller's own until this returns, so that a thread may read
                them.
        """
        if self.over:
            raise Broken("the stream has ended")
        start = PREFIX.pack(0, len(head) + sum(map(len, pieces)) + seal.size) + head
        message = Views([memoryview(start), *pieces])
        await self._connection.send(Outgoing(self, message, None, seal, len(start), lendable))

    async def receive(self) -> Message | None:
        """The next message; None after the last one.

        Raises:
            Broken: the stream broke.
        """
        return await self.reader.next()

    async def receive_whole(self) -> bytes | None:
        """The same, with all of it there, however long it is."""
        message = await self.receive()
        if not isinstance(message, Incoming):
            return message
        rest = bytearray(message.left)
        await message.read_into(Views([memoryview(rest)]), None)
        return message.head + bytes(rest)

    def begin(self) -> None:
        """The server's: the call has been taken."""
        self._connection.begin(self)

    def cancel(self) -> None:
        """Ends the stream at once; harmless if it has ended."""
        self._connection.reset(self)

    def finish(self, status: int, message: str = "") -> None:
        """The server's end of it: a status, behind everything sent."""
        self._connection.finish(self, status, message)

    def when_ended(self, call: Callable[[], None]) -> None:
        """Calls it once, when neither side has anything more to say."""
        self._ended.append(call)

    # ---- the connection's side ---------------------------------------------------------------

    def peer_ended(self, error: Exception | None = None) -> None:
        """The peer says nothing more."""
        self.peer_over = True
        self.reader.end(error)

    def closed(self) -> None:
        """Nothing more happens on it."""
        self.over = self.peer_over = True
        self.reader.end(Broken("the stream was closed"))
        calls, self._ended = self._ended, []
        for call in calls:
            call()


class Seal(Protocol):
    """Sees a message's pieces leave, and makes its end of what it has seen.

    Attributes:
        size: of the end, in bytes.
    """

    size: int

    def add(self, pieces: Sequence[memoryview]) -> None:
        """These bytes have just been given to the socket."""
        ...

    def end(self) -> bytes:
        """All of them have."""
        ...


class Outgoing:
    """One message on its way out, or the end of a stream behind its messages.

    Args:
        seal: makes the message's end.
        plain: so many bytes at the front are none of the seal's.
        lendable: a thread may read the message.

    Attributes:
        act: instead of a message.
        plain: of those bytes, how many have not been sent.
        loan: a thread that sends of it.
    """

    def __init__(
        self,
        stream: Stream,
        views: Views | None,
        act: Callable[[], None] | None = None,
        seal: Seal | None = None,
        plain: int = 0,
        lendable: bool = False,
    ) -> None:
        self.stream = stream
        self.views = views
        self.act = act
        self._seal = seal
        self.plain = plain
        self.lendable = lendable
        self.loan: Loan | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(lambda _: self.done.cancelled() or self.done.exception())

    @property
    def sealing(self) -> bool:
        """Its end is still to be made."""
        return self._seal is not None

    def part(self, room: int) -> Sequence[memoryview]:
        """The next bytes of the message, `room` at most, once those before have left."""
        assert self.views is not None
        if not self.views.left and self._seal is not None:
            self.views = Views([memoryview(self._seal.end())])
            self._seal = None
        return self.views.take(room)

    def passed(self, pieces: Sequence[memoryview]) -> None:
        """These bytes of it have just been given to the socket."""
        if self._seal is None:
            return
        if self.plain:
            rest = Views(pieces)
            self.plain -= sum(map(len, rest.take(self.plain)))
            pieces = rest.take(rest.left)
        self._seal.add(pieces)

    def left(self) -> bool:
        """Some of it has not been sent."""
        return self.views is not None and (self.views.left > 0 or self.sealing)

    def sent(self) -> None:
        """The socket has it all."""
        if not self.done.done():
            self.done.set_result(None)

    def lost(self, error: Exception) -> None:
        """It will never leave."""
        if not self.done.done():
            self.done.set_exception(error)
