"""DATA and WINDOW_UPDATE frames taken past h2: one carries a token, or a request, the other is what
a client says after every few of them, and h2 takes five times as long. So are headers of a call
that came before.

Only where nothing can be out of order: whole frames without padding, on streams that are open in
that direction, within their windows. Everything else is h2's, which also answers what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from h2.connection import ConnectionState, H2Connection
from h2.exceptions import FrameTooLargeError
from h2.stream import H2Stream, StreamInputs, StreamState
from h2.windows import WindowManager

from cluster.rpc.known_blocks import KnownBlocks
from cluster.rpc.opening import Opening
from cluster.rpc.outgoing import DATA, END_HEADERS, END_STREAM, FRAME, HEADERS

WINDOW_UPDATE, WINDOW_UPDATE_BYTES = 8, 4
MAX_WINDOW = (1 << 31) - 1

_UP = (ConnectionState.CLIENT_OPEN, ConnectionState.SERVER_OPEN)
_HEARS = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)
_OPEN = (*_HEARS, StreamState.HALF_CLOSED_REMOTE)


class Data(NamedTuple):
    """A plain DATA frame; `last`: the peer sends nothing more on the stream."""

    stream_id: int
    data: bytes
    last: bool


class Opened(NamedTuple):
    """A stream with headers that are known."""

    stream_id: int
    asked: Opening


class Grown(NamedTuple):
    """The peer takes more on a stream; 0: on the connection."""

    stream_id: int


def parts(
    protocol: H2Connection, data: bytes, known: KnownBlocks | None = None
) -> Iterator[Opened | Data | Grown | bytes]:
    """What came, in its order: frames that were counted, and what is for h2, which has to take each
    part before the next one is asked for.

    Args:
        known: at a server's end; a block that may become known is a part of its own.
    """
    start = at = 0
    longest = protocol.max_inbound_frame_size
    while _at_a_frame(protocol) and len(data) - at >= FRAME.size:
        high, low, kind, flags, stream_id = FRAME.unpack_from(data, at)
        size = high << 16 | low
        end = at + FRAME.size + size
        if size > longest or end > len(data):
            break
        if kind not in (DATA, WINDOW_UPDATE) and (known is None or kind != HEADERS):
            at = end
            continue
        if at > start:
            yield data[start:at]
            start = at
            if not _at_a_frame(protocol):
                continue
        content = data[at + FRAME.size : end]
        if kind == DATA and _count(protocol, stream_id, size, flags):
            start = end
            yield Data(stream_id, content, bool(flags))
        elif kind == WINDOW_UPDATE and not flags and _grow(protocol, stream_id, content):
            start = end
            yield Grown(stream_id)
        elif kind == HEADERS and known is not None and flags == END_HEADERS:
            asked = known.open(protocol, stream_id, content)
            start = end
            yield data[at:end] if asked is None else Opened(stream_id, asked)
        at = end
    if start < len(data):
        yield data[start:]


def taken(protocol: H2Connection, stream_id: int, size: int) -> bool:
    """So many bytes of a stream were taken: counts them as h2 does. False, and nothing is counted,
    where the peer is to hear of it: that is h2's."""
    stream = protocol.streams.get(stream_id)
    if stream is None:
        return False
    whole, own = protocol._inbound_flow_control_window_manager, stream._inbound_window_manager
    if _would_tell(whole, size) or _would_tell(own, size):
        return False
    whole._bytes_processed += size
    own._bytes_processed += size
    return True


def _would_tell(window: WindowManager, size: int) -> bool:
    """The window is empty, or half of it was taken."""
    taken = window._bytes_processed + size
    return window.current_window_size == 0 or taken >= window.max_window_size // 2


def check_unfinished(protocol: H2Connection) -> None:
    """h2 keeps the beginning of a frame, and looks at its length once all of it is there.

    Raises:
        FrameTooLargeError: it is longer than this side takes.
    """
    kept = protocol.incoming_buffer._data
    if len(kept) >= FRAME.size:
        high, low, *_ = FRAME.unpack_from(kept)
        if high << 16 | low > protocol.max_inbound_frame_size:
            raise FrameTooLargeError(f"a frame of {high << 16 | low} bytes")


def _at_a_frame(protocol: H2Connection) -> bool:
    """h2 waits for no rest of a frame, of headers or of the preface."""
    buffer = protocol.incoming_buffer
    return not (buffer._data or buffer._headers_buffer or buffer._preamble_len)


def _count(protocol: H2Connection, stream_id: int, size: int, flags: int) -> bool:
    """Takes the frame into account as h2 does; False if it is not so plain."""
    stream = protocol.streams.get(stream_id)
    if stream is None or flags not in (0, END_STREAM):
        return False
    machine = stream.state_machine
    whole, own = protocol._inbound_flow_control_window_manager, stream._inbound_window_manager
    if (
        protocol.state_machine.state not in _UP
        or machine.state not in _HEARS
        or not machine.headers_received
        or machine.trailers_received
        or stream._expected_content_length is not None
        or size > whole.current_window_size
        or size > own.current_window_size
    ):
        return False
    whole.current_window_size -= size
    own.current_window_size -= size
    if flags:
        machine.process_input(StreamInputs.RECV_END_STREAM)
    return True


def _grow(protocol: H2Connection, stream_id: int, content: bytes) -> bool:
    """As `_count`, of a window's growth."""
    if len(content) != WINDOW_UPDATE_BYTES or protocol.state_machine.state not in _UP:
        return False
    whose: H2Connection | H2Stream | None = protocol
    if stream_id:
        whose = stream = protocol.streams.get(stream_id)
        if stream is None or stream.state_machine.state not in _OPEN:
            return False
    assert whose is not None
    by = int.from_bytes(content)
    window = whose.outbound_flow_control_window + by
    if not 0 < by <= MAX_WINDOW or window > MAX_WINDOW:
        return False
    whose.outbound_flow_control_window = window
    return True
