"""A server's end of a connection: the calls of one client."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import h2.events as events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.stream import H2Stream

from cluster.rpc.abuse import Abuse
from cluster.rpc.call import Call
from cluster.rpc.endpoint import Endpoint
from cluster.rpc.headers import BEGIN, BEGIN_PACKED, OK, OK_PACKED, Headers
from cluster.rpc.inbox import Inbox
from cluster.rpc.known_blocks import KnownBlocks
from cluster.rpc.limits import Limits
from cluster.rpc.opening import Methods, Opening, Refused, opening
from cluster.rpc.plain_data import Opened
from cluster.rpc.protocol import bound_header_table, goaway, server_side


class Connection(Endpoint):
    """From the client's preface to its end.

    Args:
        names: of a verified client certificate, from what TLS tells of it.
        opened, closed: called once each.
    """

    def __init__(
        self,
        methods: Methods,
        limits: Limits,
        names: Callable[[Mapping[str, Any]], tuple[str, ...]],
        opened: Callable[[Connection], None],
        closed: Callable[[Connection], None],
    ) -> None:
        self._abuse = Abuse()
        self._blocks = KnownBlocks()
        super().__init__(server_side(limits), limits, self._abuse.answered, self._blocks)
        self._methods = methods
        self._names_of = names
        self._names: tuple[str, ...] = ()
        self._opened, self._closed = opened, closed
        self.calls: dict[int, Call] = {}
        self._draining = False

    # --- the transport's side -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._opened(self)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            if tls.selected_alpn_protocol() != "h2":
                self.abort()
                return
            self._names = self._names_of(transport.get_extra_info("peercert") or {})
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for call in list(self.calls.values()):
            call.lost()
        self._closed(self)

    def pause_writing(self) -> None:
        """A client that does not read is not read from either: its calls would only add to it."""
        super().pause_writing()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._closing:
            self._transport.resume_reading()
        super().resume_writing()

    # --- the calls' side ------------------------------------------------------------------------

    def headers(self, call: Call, headers: Headers, end: bool = False) -> None:
        """Opens the answer to a call, or ends it."""
        packed = BEGIN_PACKED if headers is BEGIN else OK_PACKED if headers is OK else b""
        # Where h2 owes the client word of a table's new size, that goes before any header.
        if packed and not self._h2.encoder.table_size_changes:
            self._send_packed(call.stream_id, packed, end)
        elif self._send_headers(call.stream_id, headers, end):
            self._out.answered = True

    def finish(self, call: Call, end: Headers) -> None:
        """A call's status; nothing of it follows."""
        self.headers(call, end, end=True)
        if not call.inbox.ended:
            self._reset(call.stream_id, ErrorCodes.NO_ERROR)
        self.closed(call)

    def reset(self, call: Call) -> None:
        """Ends a call whose client does not read what it was sent."""
        self._reset(call.stream_id, ErrorCodes.CANCEL)
        self.closed(call)

    def closed(self, call: Call) -> None:
        """A call has ended."""
        self.calls.pop(call.stream_id, None)
        call.inbox.drop()
        if self._draining and not self.calls:
            self._close()

    # --- the server's side ----------------------------------------------------------------------

    def drain(self) -> None:
        """Takes no more calls; closes after the last one."""
        if not self._draining:
            self._draining = True
            self._go_away(ErrorCodes.NO_ERROR, b"")
        if not self.calls:
            self._close()

    # --------------------------------------------------------------------------------------------

    def _call(self, stream_id: int) -> Call | None:
        return self.calls.get(stream_id)

    def _all_calls(self) -> Iterable[Call]:
        return self.calls.values()

    def _data(self, stream_id: int, data: bytes, flow: int) -> None:
        call = self.calls.get(stream_id)
        if call is None or call.ended:
            self._received(stream_id, flow)
        else:
            call.received(data, flow)

    def _half_closed(self, stream_id: int) -> None:
        if (call := self.calls.get(stream_id)) and not call.ended:
            call.half_closed()

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.DataReceived():
                self._data(event.stream_id, event.data, event.flow_controlled_length)
            case events.RequestReceived():
                self._open(event)
            case events.StreamEnded():
                self._half_closed(event.stream_id)
            case events.StreamReset():
                call = self.calls.get(event.stream_id)
                # A gateway that goes away cancels thousands at once, which were being answered.
                useless = call is None or not call.begun
                if useless and not self._abuse.reset(self._loop.time()):
                    self._go_away(ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_resets")
                    self._close()
                if call is not None:
                    call.lost()
                    if not call.running:
                        self.closed(call)
            case events.RemoteSettingsChanged():
                self._grown = True
                bound_header_table(self._h2)
            case events.WindowUpdated():
                self._window_grown(event.stream_id)
            case events.ConnectionTerminated():
                self._draining = True  # It opens no more calls; those that run go on.
            case events.PingReceived():
                if not self._abuse.pinged(self._loop.time()):
                    self._go_away(ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")
                    self._close()

    def _open(self, event: events.RequestReceived) -> None:
        stream = self._stream(event.stream_id)
        if stream is None:
            return
        try:
            asked = opening(event.headers, self._methods, self._limits.metadata_bytes)
        except Refused as refused:
            self._refuse(event.stream_id, refused.headers)
            return
        self._blocks.learn(self._h2, stream, asked)
        self._begin_call(stream, asked)

    def _begun(self, opened: Opened) -> None:
        if stream := self._stream(opened.stream_id):
            self._begin_call(stream, opened.asked)

    def _stream(self, stream_id: int) -> H2Stream | None:
        """Where a call may begin; None: it may not."""
        stream = self._h2.streams.get(stream_id)
        if stream is None or self._closing:
            return None  # It was reset in the same breath.
        if self._draining:
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)  # A client may try another server.
            return None
        return stream

    def _begin_call(self, stream: H2Stream, asked: Opening) -> None:
        stream_id = stream.stream_id
        inbox = Inbox(
            self._limits.message_bytes, asked.encoding, partial(self._received, stream_id)
        )
        self.calls[stream_id] = call = Call(self, stream_id, stream, asked, inbox, self._names)
        if asked.method.request_streaming:
            call.start()

    def _refuse(self, stream_id: int, headers: Headers) -> None:
        """Answers a stream that is no call."""
        try:
            self._h2.send_headers(stream_id, headers, end_stream=True)
        except ProtocolError:
            return  # It was reset in the same breath.
        self._reset(stream_id, ErrorCodes.NO_ERROR)

    def _go_away(self, code: ErrorCodes, why: bytes) -> None:
        self._out.put(goaway(self._h2, code, why))
