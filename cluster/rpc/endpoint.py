"""One HTTP/2 connection, what both ends of it do: h2 keeps the protocol's state, DATA frames are
packed here."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Protocol, cast

import h2.events as events
from h2.connection import ConnectionInputs, H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.stream import StreamInputs

from cluster.rpc.alive import Alive
from cluster.rpc.headers import Headers
from cluster.rpc.known_blocks import KnownBlocks
from cluster.rpc.limits import Limits
from cluster.rpc.outgoing import END_HEADERS, END_STREAM, HEADERS, PREFIX_SIZE, Outgoing
from cluster.rpc.plain_data import Data, Grown, Opened, check_unfinished, parts, taken
from cluster.rpc.sending import Flow

LINGER_SECONDS = 5.0
"""How long the end of a call waits for a peer that does not read."""

log = logging.getLogger(__name__)


class Pumped(Protocol):
    """A call that may have something waiting."""

    def pump(self) -> None: ...


class Endpoint(asyncio.Protocol, ABC):
    """From the socket's beginning to its end.

    What a turn of the event loop has for the peer leaves in one write at its end, whichever calls
    it is of.

    Args:
        said: called when something of a call leaves.
        known: at a server's end.
    """

    def __init__(
        self,
        protocol: H2Connection,
        limits: Limits,
        said: Callable[[], None],
        known: KnownBlocks | None = None,
    ) -> None:
        self._h2 = protocol
        self._known = known
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._out = Outgoing(self._write, said)
        self._paused = False
        self._grown = False
        self._closing = False
        self._alive: Alive | None = None

    # --- what either end adds -------------------------------------------------------------------

    @abstractmethod
    def _handle(self, event: events.Event) -> None:
        """What h2 has understood."""

    @abstractmethod
    def _data(self, stream_id: int, data: bytes, flow: int) -> None:
        """Bytes of a call, which count as `flow` bytes; the stream may be gone."""

    def _begun(self, opened: Opened) -> None:
        """The peer has opened a stream, with headers that are known; a client's never does."""

    @abstractmethod
    def _half_closed(self, stream_id: int) -> None:
        """The peer sends nothing more on the stream; it may be gone."""

    @abstractmethod
    def _call(self, stream_id: int) -> Pumped | None: ...

    @abstractmethod
    def _all_calls(self) -> Iterable[Pumped]: ...

    # --- the transport's side -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # What the socket does not take at once waits in the calls. So uvloop writes at once, and
        # not when all else of its turn is done. Not 0: with TLS that many would be too many.
        self._transport.set_write_buffer_limits(high=1, low=0)

    def _begin(self) -> None:
        """Says hello."""
        self._h2.initiate_connection()
        more = self._limits.window_bytes
        self._h2.increment_flow_control_window(more)
        self._collect()
        self._alive = Alive(self._limits, self._ask, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._alive is not None:
            self._alive.stop()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._alive is not None:
            self._alive.heard = True
        try:
            for part in parts(self._h2, data, self._known):
                if isinstance(part, Data):
                    self._data(part.stream_id, part.data, len(part.data))
                    if part.last:
                        self._half_closed(part.stream_id)
                    continue
                if isinstance(part, Grown):
                    self._window_grown(part.stream_id)
                    continue
                if isinstance(part, Opened):
                    self._begun(part)
                    continue
                received = self._h2.receive_data(part)
                # The peer counts by its new settings once it has our word for them: that goes
                # first, before calls use a window that has grown.
                self._collect()
                for event in received:
                    self._handle(event)
            check_unfinished(self._h2)
            if self._grown:
                self._grown = False
                self._pump()
        except (ProtocolError, UnicodeDecodeError) as error:
            log.debug("a peer broke HTTP/2: %s", error)
            self._collect()
            self._close()
            return
        self._collect()

    # --- the calls' side ------------------------------------------------------------------------

    def try_message(self, stream_id: int, flow: Flow, message: bytes) -> bool:
        """Sends all of it as one frame, or nothing."""
        size = len(message) + PREFIX_SIZE
        conn = self._h2
        if (
            self._paused
            or size > conn.max_outbound_frame_size
            or size > conn.outbound_flow_control_window
            or size > flow.outbound_flow_control_window
        ):
            return False
        # As h2's send_data does it, in a tenth of the time: a token is a frame.
        conn.outbound_flow_control_window -= size
        flow.outbound_flow_control_window -= size
        self._out.message(stream_id, message)
        return True

    def some_data(self, stream_id: int, flow: Flow, data: bytearray) -> int:
        """Sends the beginning of it, as much as can leave now; returns how many bytes that is."""
        conn = self._h2
        room = min(
            conn.max_outbound_frame_size,
            conn.outbound_flow_control_window,
            flow.outbound_flow_control_window,
        )
        if self._paused or room <= 0:
            return 0
        part = bytes(data[:room])
        conn.outbound_flow_control_window -= len(part)
        flow.outbound_flow_control_window -= len(part)
        self._out.frame(stream_id, part)
        return len(part)

    def _send_headers(self, stream_id: int, headers: Headers, end: bool = False) -> bool:
        """False if the peer has closed the stream meanwhile: its reset is on the way to us."""
        if self._transport is None:
            return False
        try:
            self._h2.send_headers(stream_id, headers, end_stream=end)
        except ProtocolError:
            return False
        self._collect()
        return True

    def _send_packed(self, stream_id: int, packed: bytes, end: bool) -> bool:
        """As `_send_headers`, of headers that are always the same: h2 takes five times as long."""
        stream = self._h2.streams.get(stream_id)
        if self._transport is None or stream is None:
            return False
        try:
            self._h2.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
            stream.state_machine.process_input(StreamInputs.SEND_HEADERS)
            if end:
                stream.state_machine.process_input(StreamInputs.SEND_END_STREAM)
        except ProtocolError:
            return False
        flags = END_HEADERS | END_STREAM if end else END_HEADERS
        self._out.frame(stream_id, packed, HEADERS, flags)
        return True

    def _reset(self, stream_id: int, code: ErrorCodes) -> None:
        if self._transport is None:
            return
        try:
            self._h2.reset_stream(stream_id, code)
        except ProtocolError:
            return  # It is closed already.
        self._collect()

    def _received(self, stream_id: int, size: int) -> None:
        """So many bytes of a stream have been taken: as many more may come."""
        if size and self._transport is not None and not taken(self._h2, stream_id, size):
            self._h2.acknowledge_received_data(size, stream_id)
            self._collect()

    def flush(self) -> None:
        """What there is leaves now, and not at the end of the turn."""
        self._out.flush()

    # --------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """Closes at once."""
        if self._transport is not None:
            self._transport.abort()

    def _window_grown(self, stream_id: int) -> None:
        """The peer takes more on the stream; 0: on the connection."""
        if not stream_id:
            self._grown = True
        elif call := self._call(stream_id):
            call.pump()

    def _pump(self) -> None:
        for call in list(self._all_calls()):
            call.pump()

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
