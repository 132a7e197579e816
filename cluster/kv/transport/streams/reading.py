"""A stream's bytes into messages. Short ones come whole; of a long one its head, and the rest goes
where whoever takes the message says."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from cluster.kv.transport.streams.loan import Loan, settle
from cluster.kv.transport.streams.protocol import PREFIX
from cluster.kv.transport.streams.views import Views

MAX_WAITING = 64
"""Messages of a stream that wait to be taken; more stay in the socket."""


Landed = Callable[[Sequence[memoryview]], None]


class BadMessage(Exception):
    """A message that cannot be read.

    Attributes:
        status: gRPC's.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Broken(Exception):
    """The stream or its connection is gone."""


class Incoming:
    """A long message of which only the head has been read.

    Attributes:
        size: of the message.
        head: its first bytes.
        left: bytes that have not come.
        loan: a thread that reads them.
    """

    def __init__(self, size: int, head: bytes, go_on: Callable[[], None]) -> None:
        self.size = size
        self.head = head
        self.left = size - len(head)
        self._go_on = go_on
        self._views: Views | None = None
        self._allowed: Callable[[], None] | None = None
        self._landed: Landed | None = None
        self._skipped = False
        self._done: asyncio.Future[None] | None = None
        self.loan: Loan | None = None

    @property
    def lendable(self) -> bool:
        """Threads may write to the memory that the rest goes to."""
        return self._views is not None and self._allowed is None

    @property
    def waits(self) -> bool:
        """Nobody has said yet where the rest goes."""
        return self._views is None and not self._skipped

    async def read_into(
        self, pieces: Views, allowed: Callable[[], None] | None, landed: Landed | None = None
    ) -> None:
        """Reads the rest into memory of its size, which is written to no more however it ends.

        Args:
            allowed: called in the very turn of the loop in which memory is written to, each time;
                what it raises ends the reading, and no byte is written any more. None: the memory
                is the caller's own until this returns.
            landed: called with the memory that has just been written to, in order; on a thread,
                perhaps, where the memory is the caller's own.

        Raises:
            ValueError: the memory is of another size.
            Broken: the rest never came.
        """
        if pieces.left != self.left:
            raise ValueError(f"{self.left} bytes into memory of {pieces.left}")
        self._views, self._allowed, self._landed = pieces, allowed, landed
        self._done = asyncio.get_running_loop().create_future()
        self._go_on()
        try:
            await self._done
        finally:
            self.skip()
            await settle(self.loan)

    def skip(self) -> None:
        """What is still to come is not wanted."""
        if self.left and not self._skipped:
            self._unwanted()
            self._go_on()

    def fail(self, error: Exception) -> None:
        """Nothing more will come."""
        self._unwanted()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _unwanted(self) -> None:
        self._skipped, self._views = True, None
        if self.loan is not None:
            self.loan.stop()

    def room(self, limit: int) -> list[memoryview]:
        """Where the next bytes go, `limit` at most; none if they are not wanted."""
        if self._views is None:
            return []
        try:
            if self._allowed is not None:
                self._allowed()
        except Exception as refusal:
            self.fail(refusal)
            return []
        return self._views.front(min(limit, self.left))

    def filled(self, size: int) -> None:
        """So many bytes have been read into `room`."""
        assert self._views is not None
        self.landed(self._views.take(size))
        self._came(size)

    def moved(self, size: int) -> None:
        """So many bytes have been read into `room`, and `landed` was called with them."""
        if self._views is not None:
            self._views.take(size)
        self._came(size)

    def landed(self, pieces: Sequence[memoryview]) -> None:
        """These bytes are where they belong."""
        if self._landed is not None:
            self._landed(pieces)

    def feed(self, data: memoryview) -> int:
        """Takes bytes that have been read; returns how many: none while it waits."""
        if self.waits:
            return 0
        size = min(len(data), self.left)
        if self.room(size):
            assert self._views is not None
            self.landed(self._views.fill(data[:size]))
        self._came(size)
        return size

    def _came(self, size: int) -> None:
        self.left -= size
        if not self.left and self._done is not None and not self._done.done():
            self._done.set_result(None)


Message = bytes | Incoming


class Reader:
    """One stream's.

    Args:
        limit: bytes of a message.
        whole: messages of up to so many bytes come whole.
        head: so many bytes of a longer one are read at once.
        go_on: called when bytes can be taken again.

    Attributes:
        current: the long message that is being read.
    """

    def __init__(self, limit: int, whole: int, head: int, go_on: Callable[[], None]) -> None:
        self._limit, self._whole, self._head = limit, whole, head
        self._go_on = go_on
        self._gathered = bytearray()
        self._size: int | None = None
        self._waiting: deque[Message] = deque()
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._ended = False
        self.current: Incoming | None = None

    def feed(self, data: memoryview) -> int:
        """Takes bytes of the stream; returns how many: not all while nobody takes the messages.

        Raises:
            BadMessage: they are no messages.
        """
        used = 0
        while used < len(data):
            rest = data[used:]
            if self.current is not None:
                taken = self.current.feed(rest)
                used += taken
                if not self.current.left:
                    self.current = None
                elif not taken:
                    break
            elif self._size is None:
                if len(self._waiting) >= MAX_WAITING:
                    break
                used += self._gather(rest, PREFIX.size)
                if len(self._gathered) == PREFIX.size:
                    self._begin()
            else:
                due = self._size if self._size <= self._whole else self._head
                used += self._gather(rest, due)
                if len(self._gathered) == due:
                    self._put(due)
        return used

    def _gather(self, data: memoryview, due: int) -> int:
        part = data[: due - len(self._gathered)]
        self._gathered += part
        return len(part)

    def _begin(self) -> None:
        packed, size = PREFIX.unpack(self._gathered)
        self._gathered.clear()
        if packed:
            raise BadMessage(12, "compressed messages are not taken")
        if size > self._limit:
            raise BadMessage(8, f"a message of {size} bytes, of {self._limit} at most")
        self._size = size
        if not size:
            self._put(0)

    def _put(self, due: int) -> None:
        assert self._size is not None
        content = bytes(self._gathered)
        if due < self._size:
            self.current = Incoming(self._size, content, self._go_on)
        self._waiting.append(self.current or content)
        self._gathered.clear()
        self._size = None
        self._changed.set()

    def end(self, error: Exception | None = None) -> None:
        """Nothing more will come: the peer has said so, or else with an error."""
        if self._ended:
            return
        self._ended = True
        within = self.current is not None and self.current.left
        if error is None and (self._gathered or self._size is not None or within):
            error = Broken("it ended within a message")
        self._error = error
        if self.current is not None:
            self.current.fail(error or Broken("it has ended"))
        self._changed.set()

    async def next(self) -> Message | None:
        """The next message; None after the last. What is left of the one before is skipped.

        Raises:
            Broken: the stream broke, once all that came before has been taken.
        """
        if self.current is not None and self.current not in self._waiting:
            self.current.skip()
        while not self._waiting:
            if self._ended:
                if self._error is not None:
                    raise self._error
                return None
            self._changed.clear()
            await self._changed.wait()
        message = self._waiting.popleft()
        self._go_on()
        return message
