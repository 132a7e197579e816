"""One call: what a servicer method sees as its context, and how its messages leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from cluster.rpc.endpoint import LINGER_SECONDS
from cluster.rpc.headers import BEGIN, OK, Headers, Metadata, trailers
from cluster.rpc.inbox import BadMessage, Inbox
from cluster.rpc.opening import Opening
from cluster.rpc.sending import Flow, Sending

if TYPE_CHECKING:
    from cluster.rpc.connection import Connection

LATE_SECONDS = 0.25
"""A method ends its call at the deadline itself; one that does not is cancelled so much later."""

Status = tuple[grpc.StatusCode, str, Sequence[tuple[str, str | bytes]]]
_OK: Status = (grpc.StatusCode.OK, "", ())

log = logging.getLogger(__name__)


class Call:
    """A stream of a connection, from its headers to its status.

    `write`, `abort`, `send_initial_metadata`, `invocation_metadata` and `time_remaining` are as of
    grpc.aio.ServicerContext.

    Args:
        stream: h2's, for its flow-control window.
        names: in the client's certificate, which TLS verified.
    """

    def __init__(
        self,
        connection: Connection,
        stream_id: int,
        stream: Flow,
        asked: Opening,
        inbox: Inbox,
        names: tuple[str, ...],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._method = asked.method
        self._metadata = asked.metadata
        self.stream_id = stream_id
        self.inbox = inbox
        self.peer_names = names
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if asked.timeout_seconds is not None:
            self._deadline = self._loop.time() + asked.timeout_seconds
            self._timer = self._loop.call_at(self._deadline + LATE_SECONDS, self._expired)
        self._sending = Sending(connection, stream_id, stream)
        self._drained = asyncio.Event()
        self.begun = False
        """Something of its answer has been sent."""

        self._end: Headers | None = None
        self._status = _OK
        self._task: asyncio.Task[None] | None = None
        self._entered = self._cancelled = False
        self.ended = False
        """Its status is on the way, or nobody waits for it."""

    # --- what methods use -----------------------------------------------------------------------

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None: it set none."""
        return None if self._deadline is None else max(0.0, self._deadline - self._loop.time())

    async def write(self, message: Any) -> None:
        """Returns when the message has left, or may leave as fast as the client reads."""
        await self.write_bytes(self._method.response_serializer(message))  # type: ignore[misc]

    async def write_bytes(self, message: bytes) -> None:
        """As `write`, of a serialised message."""
        if not self.try_write(message) and not self.ended:
            self._sending.put(message)
            self.pump()
            while self._sending.waiting:
                self._drained.clear()
                await self._drained.wait()

    def try_write(self, message: bytes) -> bool:
        """Sends a serialised message if it can leave at once; else False, and nothing is sent."""
        if self.ended:
            return False
        if not self.begun:
            self._begin()
        return self._sending.now(message)

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        """Opens the answer before its first message; there is none to send."""
        if not self.begun and not self.ended:
            self._begin()

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> NoReturn:
        """Ends the call with a status: raises AbortError, which the method lets through."""
        self._status = (code, details, trailing_metadata)
        raise grpc.aio.AbortError(details)

    # --- what the connection uses ---------------------------------------------------------------

    def start(self) -> None:
        """Calls the method."""
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._unentered)

    def _unentered(self, _: asyncio.Task[None]) -> None:
        if not self._entered:  # Cancelled before its first step: `_run` has not seen it.
            self._finish()

    def _cancel(self) -> None:
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    @property
    def running(self) -> bool:
        """Its method has begun and not ended."""
        return self._task is not None and not self._task.done()

    def received(self, data: bytes, flow: int) -> None:
        """Bytes of the caller's."""
        try:
            self.inbox.feed(data, flow)
            if not self._method.request_streaming and self.inbox.waiting > 1:
                raise BadMessage("the method takes one message")
        except BadMessage as error:
            self._unreadable(error)

    def half_closed(self) -> None:
        """The caller sends nothing more."""
        try:
            self.inbox.end()
            if not self._method.request_streaming and self._task is None:
                if not self.inbox.waiting:
                    raise BadMessage("the method takes one message")
                self.start()
        except BadMessage as error:
            self._unreadable(error)

    def pump(self) -> None:
        """Sends what waits, as far as the client and the socket take it."""
        self._sending.pump()
        if not self._sending.waiting:
            self._drained.set()
            if self._end is not None:
                if self._timer is not None:
                    self._timer.cancel()
                self._connection.finish(self, self._end)
                self._end = None

    def give_up(self, code: grpc.StatusCode, why: str) -> asyncio.Task[None] | None:
        """Ends it from outside; the method is cancelled. Returns what to wait for."""
        if not self._cancelled:
            self._status = (code, why, ())
        if self._task is None:
            self._finish()
        else:
            self._cancel()
        return self._task

    def lost(self) -> None:
        """The caller has cancelled it, or is gone: nobody waits for its status."""
        self.ended = True
        self._sending.waiting.clear()
        self._drained.set()
        if self._timer is not None:
            self._timer.cancel()
        self._cancel()

    def _begin(self) -> None:
        self.begun = True
        self._connection.headers(self, BEGIN)

    def _expired(self) -> None:
        self.give_up(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline passed")

    def _unreadable(self, error: BadMessage) -> None:
        self.give_up(_code(error), str(error))

    async def _run(self) -> None:
        self._entered = True
        try:
            await self._serve()
        except BadMessage as error:
            self._status = (_code(error), str(error), ())
        except (grpc.aio.AbortError, asyncio.CancelledError):
            # Whoever ended it has set the status; nobody else cancels this task.
            if self._status[0] is grpc.StatusCode.OK:
                self._status = (grpc.StatusCode.CANCELLED, "the call was cancelled", ())
        except Exception:
            log.exception("a method failed")
            self._status = (grpc.StatusCode.UNKNOWN, "internal error", ())
        finally:
            self._finish()

    async def _serve(self) -> None:
        method = self._method
        asked: Any
        if method.request_streaming:
            asked = self._messages()
            serve = method.stream_stream if method.response_streaming else method.stream_unary
        else:
            asked = await self._parsed(self.inbox.take())
            serve = method.unary_stream if method.response_streaming else method.unary_unary
        answer: Any = serve(asked, self)  # type: ignore[misc, arg-type]
        if not method.response_streaming:
            await self.write(await answer)
        elif hasattr(answer, "__aiter__"):
            async for message in answer:
                await self.write(message)
        else:
            await answer

    async def _messages(self) -> AsyncIterator[Any]:
        while (message := await self.inbox.next()) is not None:
            yield await self._parsed(message)

    async def _parsed(self, message: bytes) -> Any:
        try:
            return self._method.request_deserializer(message)  # type: ignore[misc]
        except Exception:
            await self.abort(grpc.StatusCode.INTERNAL, "a message could not be parsed")

    def _finish(self) -> None:
        """The status goes out behind what still waits, if the client reads that soon."""
        if self._timer is not None:
            self._timer.cancel()
        if self.ended:
            self._connection.closed(self)
            return
        self.ended = True
        end = OK
        if self._status != _OK:
            code, message, extra = self._status
            end = trailers(code.value[0], message, extra)
        if not self.begun:
            end = BEGIN + end
        if self._sending.waiting:
            self._end = end
            self._timer = self._loop.call_later(LINGER_SECONDS, self._connection.reset, self)
        else:
            self._connection.finish(self, end)


def _code(error: BadMessage) -> grpc.StatusCode:
    too_large = error.too_large
    return grpc.StatusCode.RESOURCE_EXHAUSTED if too_large else grpc.StatusCode.INTERNAL
