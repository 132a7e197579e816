"""A connection to a server, and the calls on it: messages are handed over in the turn of the event
loop that brings them.

It is read from whatever it may be written to: so it never happens that both ends wait for the
other to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import grpc
import h2.events as events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from cluster.rpc.endpoint import Endpoint
from cluster.rpc.headers import BadHeaders, binary, request
from cluster.rpc.inbox import BadMessage, Inbox
from cluster.rpc.limits import Limits
from cluster.rpc.protocol import bound_header_table, client_side
from cluster.rpc.sending import Flow, Sending

_CODES = {str(code.value[0]): code for code in grpc.StatusCode}
Metadata = Sequence[tuple[str, str]]


class CallFailed(Exception):
    """A call ended with another status than OK, or never came about.

    Attributes:
        code, details: gRPC's.
        status: a serialised google.rpc.Status with more of it, where the server sent one.
    """

    def __init__(self, code: grpc.StatusCode, details: str, status: bytes = b"") -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details
        self.status = status


def _status(headers: dict[str, str]) -> bytes:
    name = "grpc-status-details-bin"
    with contextlib.suppress(BadHeaders):
        return binary(name, headers.get(name, ""))
    return b""


class ClientCall:
    """A call, from its headers to its status.

    Attributes:
        begun: done once the server has taken the call.
        finished: done at its end. Both raise CallFailed.
    """

    def __init__(
        self,
        connection: ClientConnection,
        stream_id: int,
        flow: Flow,
        inbox: Inbox,
        received: Callable[[bytes], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._connection = connection
        self._stream_id = stream_id
        self._inbox = inbox
        self._received = received
        self._sending = Sending(connection, stream_id, flow)
        self._sent_all = False
        self.begun: asyncio.Future[None] = loop.create_future()
        self.finished: asyncio.Future[None] = loop.create_future()
        for end in (self.begun, self.finished):  # Nobody need ask for either.
            end.add_done_callback(lambda done: done.cancelled() or done.exception())

    def send(self, message: bytes) -> None:
        """At once, behind what was sent before; what the server does not take yet waits here."""
        if self.finished.done():
            return
        if not self._sending.now(message):
            self._sending.put(message)
            self.pump()
        self._connection.flush()

    def send_no_more(self) -> None:
        """The server hears of it behind what was sent."""
        self._sent_all = True
        self.pump()

    def cancel(self) -> None:
        """Ends it, if it has not ended."""
        if not self.finished.done():
            self._connection.reset(self._stream_id)
            self.end(CallFailed(grpc.StatusCode.CANCELLED, "it was cancelled here"))

    # --- what the connection uses ---------------------------------------------------------------

    def pump(self) -> None:
        self._sending.pump()
        if self._sent_all and not self._sending.waiting:
            self._sent_all = False
            self._connection.half_close(self._stream_id)

    def data(self, data: bytes, flow: int) -> None:
        """Bytes of the server's."""
        try:
            self._inbox.feed(data, flow)
            while self._inbox.waiting:
                self._received(self._inbox.take())
        except BadMessage as error:
            self._connection.reset(self._stream_id)
            self.end(CallFailed(grpc.StatusCode.INTERNAL, str(error)))

    def headers(self, headers: dict[str, str], last: bool) -> None:
        """The server's first, or its last ones."""
        if "grpc-status" in headers:
            code = _CODES.get(headers["grpc-status"], grpc.StatusCode.UNKNOWN)
            details = urllib.parse.unquote(headers.get("grpc-message", ""))
            ok = code is grpc.StatusCode.OK
            self.end(None if ok else CallFailed(code, details, _status(headers)))
        elif last or headers.get(":status", "200") != "200":
            status = f"HTTP status {headers.get(':status')} and none of gRPC's"
            self.end(CallFailed(grpc.StatusCode.UNKNOWN, status))
        elif not self.begun.done():
            self.begun.set_result(None)

    def end(self, error: CallFailed | None) -> None:
        """Nothing more comes."""
        if self.finished.done():
            return
        self._inbox.drop()
        self._connection.forget(self._stream_id)
        for future in (self.begun, self.finished):
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)


class ClientConnection(Endpoint):
    """Made by `connected`."""

    def __init__(self, authority: str, limits: Limits, scheme: str) -> None:
        super().__init__(client_side(limits), limits, lambda: None)
        self._authority = authority
        self._scheme = scheme
        self._calls: dict[int, ClientCall] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        why = str(exc) if exc is not None else "the connection was closed"
        for call in list(self._calls.values()):
            call.end(CallFailed(grpc.StatusCode.UNAVAILABLE, why))

    def open(self, path: str, metadata: Metadata, received: Callable[[bytes], None]) -> ClientCall:
        """Begins a call.

        Args:
            path: /package.Service/Method.
            received: called with each message as it comes; it does not raise.

        Raises:
            CallFailed: the connection is gone, or the server takes no more calls.
        """
        try:
            stream_id = self._h2.get_next_available_stream_id()
            headers = request(self._authority, path, metadata, self._scheme)
            sent = self._send_headers(stream_id, headers)
        except ProtocolError as error:
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, str(error)) from None
        if not sent or self._closing:
            raise CallFailed(grpc.StatusCode.UNAVAILABLE, "the connection is closed")
        inbox = Inbox(self._limits.message_bytes, "identity", partial(self._received, stream_id))
        flow = self._h2.streams[stream_id]
        self._calls[stream_id] = call = ClientCall(self, stream_id, flow, inbox, received)
        return call

    async def ask(self, path: str, metadata: Metadata, message: bytes, timeout: float) -> bytes:
        """A call of one message each way.

        Raises:
            CallFailed: it failed, or took longer than `timeout` seconds.
        """
        answers: list[bytes] = []
        call = self.open(path, metadata, answers.append)
        try:
            call.send(message)
            call.send_no_more()
            async with asyncio.timeout(timeout):
                await asyncio.shield(call.finished)
        except TimeoutError:
            raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None
        finally:
            call.cancel()
        if not answers:
            raise CallFailed(grpc.StatusCode.INTERNAL, "an answer without a message")
        return answers[0]

    def close(self) -> None:
        """With all calls on it, once what was said has left."""
        for call in list(self._calls.values()):
            call.cancel()
        self._close()

    # --- the calls' side ------------------------------------------------------------------------

    def reset(self, stream_id: int) -> None:
        self._reset(stream_id, ErrorCodes.CANCEL)

    def half_close(self, stream_id: int) -> None:
        with contextlib.suppress(ProtocolError):  # The server has closed the stream meanwhile.
            self._h2.end_stream(stream_id)
        self._collect()

    def forget(self, stream_id: int) -> None:
        self._calls.pop(stream_id, None)

    # --------------------------------------------------------------------------------------------

    def _call(self, stream_id: int) -> ClientCall | None:
        return self._calls.get(stream_id)

    def _all_calls(self) -> Iterable[ClientCall]:
        return self._calls.values()

    def _data(self, stream_id: int, data: bytes, flow: int) -> None:
        if call := self._calls.get(stream_id):
            call.data(data, flow)
        else:
            self._received(stream_id, flow)

    def _half_closed(self, stream_id: int) -> None:
        if call := self._calls.get(stream_id):
            broke = "the stream ended without a status"
            call.end(CallFailed(grpc.StatusCode.UNAVAILABLE, broke))

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.DataReceived():
                self._data(event.stream_id, event.data, event.flow_controlled_length)
            case events.ResponseReceived() | events.TrailersReceived():
                if call := self._calls.get(event.stream_id):
                    last = event.stream_ended is not None
                    call.headers({str(k): str(v) for k, v in event.headers}, last)
            case events.StreamEnded() | events.StreamReset():
                self._half_closed(event.stream_id)
            case events.RemoteSettingsChanged():
                self._grown = True
                bound_header_table(self._h2)
            case events.WindowUpdated():
                self._window_grown(event.stream_id)


@contextlib.asynccontextmanager
async def connected(
    address: str, limits: Limits, timeout: float, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ClientConnection]:
    """A connection to host:port; closed at the end.

    Args:
        tls: with h2 as its ALPN protocol; None: without TLS.

    Raises:
        CallFailed: nobody answers there within `timeout` seconds, or TLS comes to nothing.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    make: Any = partial(ClientConnection, address, limits, "http" if tls is None else "https")
    try:
        async with asyncio.timeout(timeout):
            _, connection = await loop.create_connection(make, host.strip("[]"), int(port), ssl=tls)
    except TimeoutError:
        raise CallFailed(grpc.StatusCode.UNAVAILABLE, "no answer in time") from None
    except OSError as error:
        raise CallFailed(grpc.StatusCode.UNAVAILABLE, str(error)) from None
    try:
        yield connection
    finally:
        connection.close()
