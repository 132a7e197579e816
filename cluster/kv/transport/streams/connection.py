"""One HTTP/2 connection, either end of it.

Nothing is copied on the way: a message's pieces go to the socket as they lie, and the rest of a
long message is read from the socket into the memory it belongs in. A message nobody takes stays in
the socket, and with it whatever comes behind it on this connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import h2.events as events
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError

from cluster.kv.transport.streams.protocol import (
    BEGIN,
    DATA,
    END_STREAM,
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    PADDED,
    PREFACE_BYTES,
    REPLENISH_BYTES,
    WINDOW_BYTES,
    data_header,
    frame_header,
    open_protocol,
    trailers,
    window_update,
)
from cluster.kv.transport.streams.reading import BadMessage, Broken, Reader
from cluster.kv.transport.streams.stream import Outgoing, Stream
from cluster.kv.transport.streams.views import Views

log = logging.getLogger(__name__)

TURN_BYTES = 8 << 20
"""Sent or read before others on the loop have their turn."""
MAX_UNSENT_BYTES = 1 << 20
"""Of what the protocol has to say; a peer that makes it say more and reads nothing is dropped."""
RESETS_A_SECOND = 1000
"""Streams that a peer may open only to cancel them; see CVE-2023-44487."""
SCRATCH_BYTES = 64 << 10


class _Scratch(threading.local):
    """A loop's memory for what has no place of its own, emptied in the turn in which it was
    filled."""

    def __init__(self) -> None:
        self.memory = memoryview(bytearray(SCRATCH_BYTES))


_scratch = _Scratch()


class Connection:
    """Lives on one event loop.

    Args:
        sock: connected, or about to be; not blocking.
        reader: makes a stream's, for what calls it when bytes can be taken again.
        opened: called with each stream the peer opens and its path; None on a client's end.
        closed: called once.
        max_streams: that the peer may have open.

    Attributes:
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
        self.streams: dict[int, Stream] = {}
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.ready.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.broken = ""
        self._uncounted = 0
        self._resets = (0, 0)
        # In: a frame's header or a whole frame that is not DATA, and what of a DATA frame is due.
        self._control = bytearray()
        self._preface = PREFACE_BYTES if opened is not None else 0
        self._data_left = 0
        self._data_ends = False
        self._data_of: Stream | None = None
        self._held = b""
        self._reading = False
        # Out.
        self._unsent = bytearray(self._h2.data_to_send())
        self._unsent += window_update(0, WINDOW_BYTES - self._h2.inbound_flow_control_window)
        self._queue: deque[Outgoing] = deque()
        self._now: Views | None = None
        self._writing = False
        self._sending = False

    def start(self) -> None:
        """The socket is connected."""
        self._read_on()
        self._pump()

    # ---- streams -----------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """The peer takes another stream."""
        most = self._h2.remote_settings.max_concurrent_streams
        return len(self.streams) < most

    def open(self, headers: list[tuple[str, str]]) -> Stream:
        """A client's call. Raises Broken."""
        if self.broken:
            raise Broken(self.broken)
        stream_id = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream_id, headers)
        stream = self._add(stream_id)
        self._pump()
        return stream

    def _add(self, stream_id: int) -> Stream:
        flow = self._h2.streams[stream_id]
        stream = Stream(self, stream_id, flow, self._reader(self._go_on))
        self.streams[stream_id] = stream
        return stream

    async def send(self, stream: Stream, message: Views) -> None:
        """Behind what the stream has sent before."""
        outgoing = Outgoing(stream, message)
        self._queue.append(outgoing)
        self._pump()
        if outgoing.done.done():
            return outgoing.done.result()
        try:
            await outgoing.done
        except asyncio.CancelledError:
            self._drop(outgoing)
            raise

    def _drop(self, outgoing: Outgoing) -> None:
        """Half a message is never followed by anything: its stream ends."""
        if outgoing in self._queue:
            self._queue.remove(outgoing)
            self.reset(outgoing.stream)

    def finish(self, stream: Stream, status: int, message: str) -> None:
        if stream.over:
            return

        def end() -> None:
            headers = trailers(status, message)
            if not stream.flow.state_machine.headers_sent:
                headers = BEGIN + headers
            with contextlib.suppress(ProtocolError):  # the peer has closed it meanwhile
                self._h2.send_headers(stream.id, headers, end_stream=True)
                if not stream.peer_over:
                    self._h2.reset_stream(stream.id, ErrorCodes.NO_ERROR)
            self._forget(stream)

        stream.over = True
        self._queue.append(Outgoing(stream, None, end))
        self._pump()

    def begin(self, stream: Stream) -> None:
        """The server's first headers."""
        try:
            self._h2.send_headers(stream.id, BEGIN)
        except ProtocolError:
            return  # the peer has closed it meanwhile
        self._pump()

    def reset(self, stream: Stream) -> None:
        if self.streams.get(stream.id) is not stream:
            return
        with contextlib.suppress(ProtocolError):  # it is closed already
            self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
        self._forget(stream)
        self._pump()

    def _forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is None:
            return
        for outgoing in [queued for queued in self._queue if queued.stream is stream]:
            self._queue.remove(outgoing)
            outgoing.lost(Broken("the stream was closed"))
        stream.closed()
        self._go_on()

    # ---- in ----------------------------------------------------------------------------------

    def _read_on(self) -> None:
        if not self._reading and not self.broken:
            self._reading = True
            self._loop.add_reader(self._sock, self._readable)

    def _go_on(self) -> None:
        """What could not be taken before can perhaps be now. Not in this turn: it may be asked for
        in the middle of one."""
        if not self._reading and not self.broken:
            self._loop.call_soon(self._take_held)

    def _take_held(self) -> None:
        if self._reading or self.broken:
            return
        held, self._held = self._held, b""
        self._read_on()
        self._guard(memoryview(held))

    def _readable(self) -> None:
        turn = TURN_BYTES
        while turn > 0 and self._reading and not self.broken:
            try:
                turn -= self._read()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                return self.close(f"the connection broke: {error}")

    def _read(self) -> int:
        """One system call; returns the bytes that came."""
        pieces: list[memoryview] = []
        current = None
        if self._data_left and self._data_of is not None:
            current = self._data_of.reader.current
            if current is not None and current.left:
                pieces = current.room(self._data_left)
        scratch = _scratch.memory
        size = int(self._sock.recvmsg_into([*pieces, scratch])[0])
        if not size:
            self.close("the peer closed the connection")
            return 1
        placed = min(size, sum(map(len, pieces)))
        if placed and current is not None:
            current.filled(placed)
            self._came(placed)
        if size > placed:
            self._guard(scratch[: size - placed])
        return size

    def _guard(self, data: memoryview) -> None:
        try:
            self._parse(data)
        except (ProtocolError, UnicodeDecodeError, ValueError) as error:
            log.info("a peer broke HTTP/2: %s", error)
            self._pump()  # what h2 has to say of it
            self.close("the peer broke the protocol")

    def _parse(self, data: memoryview) -> None:
        while len(data) and not self.broken:
            if self._data_left:
                used = self._data(data[: self._data_left])
                data = data[used:]
                if not used:  # nobody takes it yet
                    self._held = bytes(data)
                    self._reading = False
                    self._loop.remove_reader(self._sock)
                    return
            elif self._preface:
                self._control += data[: self._preface]
                data, self._preface = data[self._preface :], self._preface - len(data)
                if self._preface <= 0:
                    self._preface = 0
                    self._obey()
                elif not b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".startswith(self._control):
                    raise ValueError("no preface")
            else:
                data = self._frame(data)
        self._pump()

    def _frame(self, data: memoryview) -> memoryview:
        """A frame's header, or more of a frame that is not DATA; returns what is behind it."""
        begun = len(self._control)
        if begun < HEADER_BYTES:
            self._control += data[: HEADER_BYTES - begun]
            data = data[HEADER_BYTES - begun :]
            if len(self._control) < HEADER_BYTES:
                return data
        length, kind, flags, stream_id = frame_header(self._control[:HEADER_BYTES])
        if kind == DATA:
            self._control.clear()
            self._begin_data(length, flags, stream_id)
            return data
        if length > MAX_CONTROL_BYTES:
            raise ValueError("a frame is too long")
        due = HEADER_BYTES + length - len(self._control)
        self._control += data[:due]
        if len(self._control) == HEADER_BYTES + length:
            self._obey()
        return data[due:]

    def _begin_data(self, length: int, flags: int, stream_id: int) -> None:
        if flags & PADDED:
            raise ValueError("padded frames are not taken")
        if stream_id > max(self._h2.highest_inbound_stream_id, self._h2.highest_outbound_stream_id):
            raise ValueError("data of a stream that was never opened")
        self._data_left = length
        self._data_ends = bool(flags & END_STREAM)
        self._data_of = self.streams.get(stream_id)
        if not length:
            self._end_data()

    def _data(self, data: memoryview) -> int:
        """Of the DATA frame that is due; returns how much could be taken."""
        stream = self._data_of
        used = len(data)
        if stream is not None and not stream.peer_over and stream.id in self.streams:
            try:
                used = stream.reader.feed(data)
            except BadMessage as bad:
                stream.peer_ended(Broken(str(bad)))
                self.finish(stream, bad.status, str(bad))
        self._came(used)
        return used

    def _came(self, size: int) -> None:
        """So many bytes of the DATA frame have been taken."""
        stream = self._data_of
        self._data_left -= size
        self._uncounted += size
        if self._uncounted >= REPLENISH_BYTES:
            self._unsent += window_update(0, self._uncounted)
            self._uncounted = 0
        if stream is not None:
            stream.uncounted += size
            if stream.uncounted >= REPLENISH_BYTES and not stream.peer_over:
                self._unsent += window_update(stream.id, stream.uncounted)
                stream.uncounted = 0
        if not self._data_left:
            self._end_data()

    def _end_data(self) -> None:
        stream, self._data_of = self._data_of, None
        if self._data_ends and stream is not None and stream.id in self.streams:
            self._handle(self._h2.receive_data(data_header(stream.id, 0, END_STREAM)))

    def _obey(self) -> None:
        """A whole frame, or the preface, is there."""
        frame = bytes(self._control)
        self._control.clear()
        self._handle(self._h2.receive_data(frame))

    def _handle(self, received: list[events.Event]) -> None:
        for event in received:
            match event:
                case events.RequestReceived():
                    self._request(event)
                case events.ResponseReceived() | events.TrailersReceived():
                    self._status(event.stream_id, _texts(event.headers))
                case events.StreamEnded():
                    if stream := self.streams.get(event.stream_id):
                        stream.peer_ended()
                        if self._opened is None:
                            self._forget(stream)
                case events.StreamReset():
                    self._was_reset(event)
                case events.RemoteSettingsChanged():
                    if not self.ready.done():
                        self.ready.set_result(None)
                case events.ConnectionTerminated():
                    self.close("the peer says goodbye")

    def _status(self, stream_id: int, headers: dict[str, str]) -> None:
        """Of a call, if these headers are its last."""
        stream = self.streams.get(stream_id)
        if stream is not None and "grpc-status" in headers and headers["grpc-status"] != "0":
            said = headers.get("grpc-message", "")
            stream.peer_ended(Broken(f"gRPC status {headers['grpc-status']}: {said}"))

    def _was_reset(self, event: events.StreamReset) -> None:
        second = int(self._loop.time())
        self._resets = (second, self._resets[1] + 1 if self._resets[0] == second else 1)
        if self._resets[1] > RESETS_A_SECOND:
            raise ValueError("too many resets")
        if stream := self.streams.get(event.stream_id):
            stream.peer_ended(Broken("the peer reset the stream"))
            self._forget(stream)

    def _request(self, event: events.RequestReceived) -> None:
        assert self._opened is not None
        if event.stream_id not in self._h2.streams:
            return  # it was reset in the same breath
        headers = _texts(event.headers)
        stream = self._add(event.stream_id)
        if not headers.get("content-type", "").startswith("application/grpc"):
            self._h2.send_headers(stream.id, [(":status", "415")], end_stream=True)
            return self.reset(stream)
        self._opened(stream, headers.get(":path", ""))

    # ---- out ---------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Sends what the socket takes."""
        if not self._writing and not self._sending:
            self._flush()

    def _flush(self) -> None:
        self._sending = True
        try:
            self._send_some()
        finally:
            self._sending = False

    def _send_some(self) -> None:
        turn = TURN_BYTES
        while not self.broken:
            if self._now is None and not self._next():
                return self._write_on(False)
            assert self._now is not None
            try:
                size = self._sock.sendmsg(self._now.front(TURN_BYTES))
            except (BlockingIOError, InterruptedError):
                return self._write_on(True)
            except OSError as error:
                return self.close(f"the connection broke: {error}")
            self._now.advance(size)
            if not self._now.left:
                self._now = None
                self._sent()
            turn -= size
            if turn <= 0:
                return self._write_on(True)

    def _write_on(self, more: bool) -> None:
        """Goes on when the socket takes more."""
        if more and not self._writing:
            self._loop.add_writer(self._sock, self._flush)
        elif not more and self._writing:
            self._loop.remove_writer(self._sock)
        self._writing = more

    def _next(self) -> bool:
        """The next frame into `_now`; False if there is none that may leave."""
        self._collect()
        if self._unsent:
            self._now = Views([memoryview(bytes(self._unsent))])
            self._unsent.clear()
            return True
        blocked: set[Stream] = set()
        for outgoing in tuple(self._queue):
            if outgoing.stream in blocked:
                continue
            if outgoing.act is not None:
                self._queue.remove(outgoing)
                outgoing.act()
                self._collect()
                continue
            room = min(
                self._h2.max_outbound_frame_size,
                self._h2.outbound_flow_control_window,
                outgoing.stream.flow.outbound_flow_control_window,
            )
            if room > 0 and outgoing in self._queue:
                return self._data_frame(outgoing, room)
            blocked.add(outgoing.stream)
        if self._unsent:
            return self._next()
        return False

    def _data_frame(self, outgoing: Outgoing, room: int) -> bool:
        part = outgoing.part(room)
        size = sum(map(len, part))
        self._h2.outbound_flow_control_window -= size
        outgoing.stream.flow.outbound_flow_control_window -= size
        self._now = Views([memoryview(data_header(outgoing.stream.id, size)), *part])
        return True

    def _sent(self) -> None:
        """A frame has left: so has, perhaps, the message it was the end of."""
        for outgoing in self._queue:
            if outgoing.act is None and not outgoing.left():
                self._queue.remove(outgoing)
                outgoing.sent()
                return

    def _collect(self) -> None:
        self._unsent += self._h2.data_to_send()
        if len(self._unsent) > MAX_UNSENT_BYTES:
            self.close("the peer reads nothing")

    # ---- the end -----------------------------------------------------------------------------

    def close(self, why: str) -> None:
        """Every stream ends; harmless if it is closed."""
        if self.broken:
            return
        self.broken = why
        if self._reading:
            self._loop.remove_reader(self._sock)
        if self._writing:
            self._loop.remove_writer(self._sock)
        self._reading = self._writing = False
        self._sock.close()
        if not self.ready.done():
            self.ready.set_exception(Broken(why))
        for outgoing in self._queue:
            outgoing.lost(Broken(why))
        self._queue.clear()
        for stream in list(self.streams.values()):
            stream.peer_ended(Broken(why))
            del self.streams[stream.id]
            stream.closed()
        self._closed(self)


def _texts(headers: Iterable[tuple[Any, Any]]) -> dict[str, str]:
    return {str(name): str(value) for name, value in headers}
