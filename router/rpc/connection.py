"""One client's connection: h2 keeps the protocol's state, DATA frames are packed here."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import h2.events as events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from router.rpc.abuse import Abuse
from router.rpc.alive import Alive
from router.rpc.call import LINGER_SECONDS, Call
from router.rpc.headers import Headers
from router.rpc.inbox import Inbox
from router.rpc.limits import Limits
from router.rpc.opening import Methods, Refused, opening
from router.rpc.outgoing import Outgoing
from router.rpc.protocol import bound_header_table, goaway, server_side

_HIGH_WATER_BYTES = 256 << 10
"""That wait in the socket's buffer before calls keep what they have for themselves."""

log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """From the client's preface to its end.

    What a turn of the event loop has for this client leaves in one write at its end, whichever
    calls it is of.

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
        self._methods = methods
        self._limits = limits
        self._names_of = names
        self._names: tuple[str, ...] = ()
        self._opened, self._closed = opened, closed
        self._loop = asyncio.get_running_loop()
        self._h2 = server_side(limits)
        self._abuse = Abuse()
        self.calls: dict[int, Call] = {}
        self._transport: asyncio.Transport | None = None
        self._out = Outgoing(self._write, self._abuse.answered)
        self._paused = False
        self._grown = False
        self._draining = False
        self._closing = False
        self._alive: Alive | None = None

    # --- the transport's side -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)
        self._opened(self)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None:
            if tls.selected_alpn_protocol() != "h2":
                self._transport.abort()
                return
            self._names = self._names_of(transport.get_extra_info("peercert") or {})
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(self._limits.window_bytes)
        self._collect()
        self._alive = Alive(self._limits, self._ask, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._alive is not None:
            self._alive.stop()
        for call in list(self.calls.values()):
            call.lost()
        self._closed(self)

    def pause_writing(self) -> None:
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport is not None and not self._closing:
            self._transport.resume_reading()
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._alive is not None:
            self._alive.heard = True
        try:
            received = self._h2.receive_data(data)
            # The client counts by its new settings once it has our word for them: that goes first,
            # before calls use a window that has grown.
            self._collect()
            for event in received:
                self._handle(event)
            if self._grown:
                self._grown = False
                self._pump()
        except (ProtocolError, UnicodeDecodeError) as error:
            log.debug("a client broke HTTP/2: %s", error)
            self._collect()
            self._close()
            return
        self._collect()

    # --- the calls' side ------------------------------------------------------------------------

    def headers(self, call: Call, headers: Headers, end: bool = False) -> None:
        """Opens the answer to a call, or ends it."""
        if self._transport is None:
            return
        try:
            self._h2.send_headers(call.stream_id, headers, end_stream=end)
        except ProtocolError:
            return  # The client has closed the stream meanwhile: its reset is on the way to us.
        self._collect()
        self._out.answered = True

    def try_data(self, call: Call, data: bytes) -> bool:
        """Sends all of it as one frame, or nothing."""
        size = len(data)
        conn, stream = self._h2, call.stream
        if (
            self._paused
            or size > conn.max_outbound_frame_size
            or size > conn.outbound_flow_control_window
            or size > stream.outbound_flow_control_window
        ):
            return False
        # As h2's send_data does it, in a tenth of the time: a token is a frame.
        conn.outbound_flow_control_window -= size
        stream.outbound_flow_control_window -= size
        self._out.data(call.stream_id, data)
        return True

    def some_data(self, call: Call, data: bytearray) -> int:
        """Sends the beginning of it, as much as can leave now; returns how many bytes that is."""
        conn, stream = self._h2, call.stream
        room = min(
            conn.max_outbound_frame_size,
            conn.outbound_flow_control_window,
            stream.outbound_flow_control_window,
        )
        part = bytes(data[: max(0, room)])
        return len(part) if part and self.try_data(call, part) else 0

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

    def abort(self) -> None:
        """Closes at once."""
        if self._transport is not None:
            self._transport.abort()

    # --------------------------------------------------------------------------------------------

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.DataReceived():
                call = self.calls.get(event.stream_id)
                if call is None or call.ended:
                    self._received(event.stream_id, event.flow_controlled_length)
                else:
                    call.received(event.data, event.flow_controlled_length)
            case events.RequestReceived():
                self._open(event)
            case events.StreamEnded():
                if (call := self.calls.get(event.stream_id)) and not call.ended:
                    call.half_closed()
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
            case events.WindowUpdated(stream_id=0):
                self._grown = True
            case events.RemoteSettingsChanged():
                self._grown = True
                bound_header_table(self._h2)
            case events.WindowUpdated():
                if call := self.calls.get(event.stream_id):
                    call.pump()
            case events.ConnectionTerminated():
                self._draining = True  # It opens no more calls; those that run go on.
            case events.PingReceived():
                if not self._abuse.pinged(self._loop.time()):
                    self._go_away(ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")
                    self._close()

    def _open(self, event: events.RequestReceived) -> None:
        stream_id = event.stream_id
        stream = self._h2.streams.get(stream_id)
        if stream is None or self._closing:
            return  # It was reset in the same breath.
        if self._draining:
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)  # A client may try another server.
            return
        try:
            asked = opening(event.headers, self._methods, self._limits.metadata_bytes)
        except Refused as refused:
            self._refuse(stream_id, refused.headers)
            return
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

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        if self._transport is None:
            return
        try:
            self._h2.reset_stream(stream_id, code)
        except ProtocolError:
            return  # It is closed already.
        self._collect()

    def _received(self, stream_id: int, size: int) -> None:
        if size and self._transport is not None:
            self._h2.acknowledge_received_data(size, stream_id)
            self._collect()

    def _pump(self) -> None:
        for call in list(self.calls.values()):
            call.pump()

    def _go_away(self, code: ErrorCodes, why: bytes) -> None:
        self._out.put(goaway(self._h2, code, why))

    def _ask(self) -> None:
        if self._closing:
            self.abort()  # What it was sent last has not left.
            return
        self._h2.ping(b"pdserve?")
        self._collect()

    def _collect(self) -> None:
        """What h2 has to say, in its place among the DATA frames."""
        if said := self._h2.data_to_send():
            self._out.put(said)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _close(self) -> None:
        self._closing = True
        self._out.flush()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            self._loop.call_later(LINGER_SECONDS, self.abort)
