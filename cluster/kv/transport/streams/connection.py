"""One HTTP/2 connection, either end of it.

Nothing is copied on the way: a message's pieces go to the socket as they lie, and the rest of a
long message is read from the socket into the memory it belongs in. A message nobody takes stays in
the socket, and with it whatever comes behind it on this connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import Any

import h2.events as events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from cluster.kv.transport.streams.loan import settle
from cluster.kv.transport.streams.protocol import (
    BEGIN,
    END_STREAM,
    REPLENISH_BYTES,
    WINDOW_BYTES,
    Headers,
    data_header,
    open_protocol,
    trailers,
    window_update,
)
from cluster.kv.transport.streams.reading import BadMessage, Broken, Incoming, Reader
from cluster.kv.transport.streams.receiving import Receiving
from cluster.kv.transport.streams.sending import Sending
from cluster.kv.transport.streams.stream import Outgoing, Stream

RESETS_A_SECOND = 1000
"""Streams that a peer may open only to cancel them; see CVE-2023-44487."""


class Connection:
    """Lives on one event loop.

    Args:
        sock: connected, not blocking.
        reader: makes a stream's, for what it calls when bytes can be taken again.
        opened: called with each stream the peer opens and its path; None on a client's end.
        closed: called once.
        max_streams: that the peer may have open.

    Attributes:
        streams: under way, by their ids.
        ready: the peer's settings are known.
        broken: why it is gone; empty while it is up.
    """

    def __init__(
        self,
        sock: socket.socket,
        reader: Callable[[Callable[[], None]], Reader],
        opened: Callable[[Stream, str], None] | None,
        closed: Callable[[Connection], None],
        max_streams: int,
    ) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._reader = reader
        self._opened = opened
        self._closed = closed
        self._h2 = open_protocol(opened is None, max_streams)
        self._sending = Sending(sock, self._h2, self.close)
        self._receiving = Receiving(sock, self, opened is not None, self.close)
        self.streams: dict[int, Stream] = {}
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ready.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.broken = ""
        self._uncounted = 0
        self._resets = (0, 0)
        self._into: Stream | None = None

    def start(self) -> None:
        """Says hello and begins to read."""
        self._sending.say(self._h2.data_to_send())
        more = WINDOW_BYTES - self._h2.inbound_flow_control_window
        self._sending.say(window_update(0, more))
        self._receiving.start()
        self._sending.pump()

    # ---- streams -----------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """The peer takes another stream."""
        return len(self.streams) < self._h2.remote_settings.max_concurrent_streams

    def open(self, headers: Headers) -> Stream:
        """A client's call. Raises Broken."""
        if self.broken:
            raise Broken(self.broken)
        stream_id = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream_id, headers)
        stream = self._add(stream_id)
        self._sending.pump()
        return stream

    def _add(self, stream_id: int) -> Stream:
        flow = self._h2.streams[stream_id]
        stream = Stream(self, stream_id, flow, self._reader(self._receiving.go_on))
        self.streams[stream_id] = stream
        return stream

    def begin(self, stream: Stream) -> None:
        """A server's first headers."""
        with contextlib.suppress(ProtocolError):  # the peer has closed it meanwhile
            self._h2.send_headers(stream.id, BEGIN)
            self._sending.pump()

    async def send(self, outgoing: Outgoing) -> None:
        """Behind what its stream has sent before. Raises Broken."""
        self._sending.put(outgoing)
        try:
            await outgoing.done
        except asyncio.CancelledError:
            if self._sending.drop(outgoing):
                self.reset(outgoing.stream)  # half a message is never followed by anything
            raise
        finally:
            await settle(outgoing.loan)

    def finish(self, stream: Stream, status: int, message: str) -> None:
        """A server's end of a stream, behind what it has sent."""
        if stream.over:
            return
        stream.over = True

        def end() -> None:
            headers = trailers(status, message)
            if not stream.flow.state_machine.headers_sent:
                headers = BEGIN + headers
            with contextlib.suppress(ProtocolError):  # the peer has closed it meanwhile
                self._h2.send_headers(stream.id, headers, end_stream=True)
                if not stream.peer_over:
                    self._h2.reset_stream(stream.id, ErrorCodes.NO_ERROR)
            self._forget(stream)

        self._sending.put(Outgoing(stream, None, end))

    def reset(self, stream: Stream) -> None:
        """Ends a stream at once."""
        if self.streams.get(stream.id) is not stream:
            return
        with contextlib.suppress(ProtocolError):  # it is closed already
            self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
        self._forget(stream)
        self._sending.pump()

    def _forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is not None:
            self._sending.forget(stream)
            stream.closed()
            self._receiving.go_on()

    # ---- of `Taker` --------------------------------------------------------------------------

    def coming(self) -> Incoming | None:
        return self._into.reader.current if self._into is not None else None

    def fed(self) -> None:
        self._sending.pump()

    def begin_data(self, stream_id: int) -> None:
        if stream_id > max(self._h2.highest_inbound_stream_id, self._h2.highest_outbound_stream_id):
            raise ValueError("data of a stream that was never opened")
        self._into = self.streams.get(stream_id)

    def data(self, data: memoryview) -> int:
        stream = self._into
        used = len(data)
        if stream is not None and not stream.peer_over and stream.id in self.streams:
            try:
                used = stream.reader.feed(data)
            except BadMessage as bad:
                stream.peer_ended(Broken(str(bad)))
                self.finish(stream, bad.status, str(bad))
        self.count(used)
        return used

    def count(self, size: int) -> None:
        # Flow control: what came may come again.
        stream = self._into
        self._uncounted += size
        if self._uncounted >= REPLENISH_BYTES:
            self._sending.say(window_update(0, self._uncounted))
            self._uncounted = 0
        if stream is not None:
            stream.uncounted += size
            if stream.uncounted >= REPLENISH_BYTES and stream.id in self.streams:
                self._sending.say(window_update(stream.id, stream.uncounted))
                stream.uncounted = 0

    def end_data(self, stream_id: int, last: bool) -> None:
        self._into = None
        if last and stream_id in self.streams:
            self.control(data_header(stream_id, 0, END_STREAM))

    def control(self, frame: bytes) -> None:
        for event in self._h2.receive_data(frame):
            match event:
                case events.RequestReceived() if event.stream_id in self._h2.streams:
                    self._request(event.stream_id, _texts(event.headers))
                case events.ResponseReceived() | events.TrailersReceived():
                    self._status(event.stream_id, _texts(event.headers))
                case events.StreamEnded():
                    if stream := self.streams.get(event.stream_id):
                        stream.peer_ended()
                        if self._opened is None:
                            self._forget(stream)
                case events.StreamReset():
                    self._was_reset(event.stream_id)
                case events.RemoteSettingsChanged() if not self.ready.done():
                    self.ready.set_result(None)
                case events.ConnectionTerminated():
                    self.close("the peer says goodbye")

    def _request(self, stream_id: int, headers: dict[str, str]) -> None:
        if self._opened is None:
            raise ValueError("a call from a server")
        stream = self._add(stream_id)
        if headers.get("content-type", "").startswith("application/grpc"):
            return self._opened(stream, headers.get(":path", ""))
        self._h2.send_headers(stream.id, [(":status", "415")], end_stream=True)
        self.reset(stream)

    def _status(self, stream_id: int, headers: dict[str, str]) -> None:
        """Of a call, if these headers are its last."""
        status = headers.get("grpc-status", "0")
        if (stream := self.streams.get(stream_id)) and status != "0":
            said = headers.get("grpc-message", "")
            stream.peer_ended(Broken(f"gRPC status {status}: {said}"))

    def _was_reset(self, stream_id: int) -> None:
        second = int(self._loop.time())
        self._resets = (second, self._resets[1] + 1 if self._resets[0] == second else 1)
        if self._resets[1] > RESETS_A_SECOND:
            raise ValueError("too many resets")
        if stream := self.streams.get(stream_id):
            stream.peer_ended(Broken("the peer reset the stream"))
            self._forget(stream)

    # ---- the end -----------------------------------------------------------------------------

    def close(self, why: str) -> None:
        """Every stream ends; harmless if it is closed."""
        if self.broken:
            return
        self.broken = why
        self._receiving.close()
        self._sending.close(why)
        self._close_socket()
        if not self.ready.done():
            self.ready.set_exception(Broken(why))
        for stream in list(self.streams.values()):
            stream.peer_ended(Broken(why))
            del self.streams[stream.id]
            stream.closed()
        self._closed(self)

    def _close_socket(self) -> None:
        """Once no thread is at it: its number may be another's right afterwards."""
        loans = [loan for loan in (self._sending.loan, self._receiving.loan) if loan is not None]
        if not loans:
            return self._sock.close()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        both = asyncio.gather(*(loan.returned for loan in loans))
        both.add_done_callback(lambda _: self._sock.close())


def _texts(headers: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    return {str(name): str(value) for name, value in headers}
