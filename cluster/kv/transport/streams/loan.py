"""Payloads between sockets and memory that stays put, on threads of their own.

A system call that moves a payload gives Python's lock away for as long as it copies, and so does a
checksum. One thread copies, another one sums up what has been copied, and the loop does all else: a
socket's rate is then that of the copying alone. Only whoever owns the memory until the threads are
out of it may have it lent: a cache's blocks may be another's in the next moment.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from cluster.kv.transport.streams.views import Views

log = logging.getLogger(__name__)

LEND_BYTES = 1 << 20
"""Less is not worth a thread's wake-up."""
PART_BYTES = 1 << 20
LOOK_MS = 50
"""A thread whose socket has nothing for it looks so often whether it is to stop."""
IDLE_SECONDS = 30.0


class Loan:
    """A run of bytes that threads move between a socket and memory. Lives on a loop.

    Args:
        move: the socket's call: moves some of the pieces' bytes, and returns how many.
        ready: the socket's event (of `select.poll`) after which it moves more.
        passed: called on a thread with what has just been moved, in order.
        back: called on the loop once, when no thread touches the socket or the memory any more;
            with the bytes moved, and why the socket is of no more use, or nothing.

    Attributes:
        stopped: before all was moved, perhaps.
        returned: done when `back` is called.
    """

    def __init__(
        self,
        sock: socket.socket,
        move: Callable[[Sequence[memoryview]], int],
        ready: int,
        views: Views,
        passed: Callable[[Sequence[memoryview]], None],
        back: Callable[[int, str], None],
    ) -> None:
        self._sock = sock
        self._move = move
        self._ready = ready
        self._views = views
        self._passed = passed
        self._back = back
        self._moved = 0
        self._failure = ""
        self._loop = asyncio.get_running_loop()
        self.stopped = False
        self.returned: asyncio.Future[None] = self._loop.create_future()

    def stop(self) -> None:
        """No further part is begun."""
        self.stopped = True

    def parts(self) -> Iterator[list[memoryview]]:
        """Moves, part by part, on a thread. Raises OSError, and EOFError where the peer has
        closed the connection."""
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
            yield self._views.take(size)

    def sum_up(self, part: Sequence[memoryview]) -> None:
        """On another thread."""
        self._moved += sum(map(len, part))
        if not self._failure:
            try:
                self._passed(part)
            except Exception as error:
                log.exception("a payload was not summed up")
                self._failure = f"a payload was not summed up: {error}"
                self.stop()

    def give_back(self, why: str) -> None:
        """On that thread, too, behind the last part."""
        why = self._failure or why
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._return, why)

    def _return(self, why: str) -> None:
        back = self._back
        # Whoever is called refers to the loan: the memory would stay until that circle is found.
        del self._back, self._passed, self._move, self._views
        self.returned.set_result(None)
        back(self._moved, why)


_Moved = tuple[Loan, list[memoryview] | None, str]


class Porter:
    """The threads of one direction of a connection: they begin with the first loan, and end when
    none has come for a while."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loans: queue.SimpleQueue[Loan] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._working = False

    def take(self, loan: Loan) -> None:
        """One at a time."""
        with self._lock:
            if not self._working:
                try:
                    self._start()
                except RuntimeError as error:
                    log.error("a payload is not moved: %s", error)
                    return loan.give_back(f"a payload is not moved: {error}")
                self._working = True
            self._loans.put(loan)

    def _start(self) -> None:
        """Raises RuntimeError if the process may have no more threads."""
        moved: queue.SimpleQueue[_Moved | None] = queue.SimpleQueue()
        for work in (self._sum_up, self._carry):
            try:
                threading.Thread(target=work, args=(moved,), name=self._name, daemon=True).start()
            except RuntimeError:
                moved.put(None)
                raise

    def _carry(self, moved: queue.SimpleQueue[_Moved | None]) -> None:
        while (loan := self._next()) is not None:
            _carry(loan, moved)
            del loan  # and with it the memory, while there is nothing to do
        moved.put(None)

    def _sum_up(self, moved: queue.SimpleQueue[_Moved | None]) -> None:
        while (item := moved.get()) is not None:
            _sum_up(*item)
            del item

    def _next(self) -> Loan | None:
        try:
            return self._loans.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            with self._lock:
                self._working = not self._loans.empty()
                return self._loans.get() if self._working else None


def _carry(loan: Loan, moved: queue.SimpleQueue[_Moved | None]) -> None:
    why = ""
    try:
        for part in loan.parts():
            moved.put((loan, part, ""))
    except EOFError:
        why = "the peer closed the connection"
    except OSError as error:
        why = f"the connection broke: {error}"
    except Exception as error:
        log.exception("a payload was not moved")
        why = f"a payload was not moved: {error}"
    moved.put((loan, None, why))


def _sum_up(loan: Loan, part: list[memoryview] | None, why: str) -> None:
    if part is None:
        loan.give_back(why)
    else:
        loan.sum_up(part)


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
