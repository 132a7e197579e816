"""Socket calls on threads of their own, for payloads whose memory stays put.

A system call that moves a payload gives Python's lock away for as long as it copies. On a thread of
its own it copies the next part while the loop sums the last one up and does all else; a socket's
rate is then that of the copying alone. Only whoever owns the memory until the thread is out of it
may have it lent: a cache's blocks may be another's in the next moment.
"""

from __future__ import annotations

import asyncio
import queue
import select
import socket
import threading
from collections.abc import Callable, Sequence

from cluster.kv.transport.streams.views import Views

LEND_BYTES = 1 << 20
"""Less is not worth a thread's wake-up."""
PART_BYTES = 1 << 20
LOOK_MS = 50
"""A thread whose socket has nothing for it looks so often whether it is to stop."""
IDLE_SECONDS = 30.0


class Loan:
    """A run of bytes that a thread moves between a socket and memory. Lives on a loop.

    Args:
        move: the socket's call: moves some of the pieces' bytes, and returns how many.
        ready: the socket's event (of `select.poll`) after which it moves more.
        moved: called on the loop for each part, in order.
        back: called on the loop once, when the thread touches neither any more; with why the socket
            is of no more use, or nothing.

    Attributes:
        stopped: before all was moved.
        returned: done when `back` is called.
    """

    def __init__(
        self,
        sock: socket.socket,
        move: Callable[[Sequence[memoryview]], int],
        ready: int,
        views: Views,
        moved: Callable[[int], None],
        back: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._move = move
        self._ready = ready
        self._views = views
        self._moved = moved
        self._back = back
        self._loop = asyncio.get_running_loop()
        self.stopped = False
        self.returned: asyncio.Future[None] = self._loop.create_future()

    def stop(self) -> None:
        """No further part is begun."""
        self.stopped = True

    def run(self) -> None:
        """On the thread."""
        why = ""
        try:
            self._run()
        except OSError as error:
            why = f"the connection broke: {error}"
        except EOFError:
            why = "the peer closed the connection"
        self._tell(self._return, why)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._sock, self._ready)
        while self._views.left and not self.stopped:
            try:
                size = self._move(self._views.front(PART_BYTES))
            except (BlockingIOError, InterruptedError):
                poll.poll(LOOK_MS)
                continue
            if not size:
                raise EOFError
            self._views.advance(size)
            self._tell(self._moved, size)

    def _tell(self, call: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:  # the loop is closed: nobody waits
            self.stopped = True

    def _return(self, why: str) -> None:
        self.returned.set_result(None)
        self._back(why)


class Porter:
    """The thread of one direction of a connection: begins with the first loan, and ends when none
    has come for a while."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loans: queue.SimpleQueue[Loan] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._working = False

    def take(self, loan: Loan) -> None:
        """One at a time."""
        with self._lock:
            self._loans.put(loan)
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        while (loan := self._next()) is not None:
            loan.run()

    def _next(self) -> Loan | None:
        try:
            return self._loans.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            with self._lock:
                self._working = not self._loans.empty()
                return self._loans.get() if self._working else None


async def settle(loan: Loan | None) -> None:
    """Waits until a loan is back, whoever else gives up meanwhile."""
    cancelled = False
    while loan is not None and not loan.returned.done():
        try:
            await asyncio.shield(loan.returned)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
