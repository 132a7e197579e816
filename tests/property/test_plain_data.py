"""DATA frames taken past h2 come to the same as when h2 takes them, however bytes are cut."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import ProtocolError
from hpack import NeverIndexedHeaderTuple
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.rpc.known_blocks import KnownBlocks
from cluster.rpc.limits import Limits
from cluster.rpc.opening import Opening
from cluster.rpc.plain_data import Data, Grown, Opened, parts, taken
from cluster.rpc.protocol import server_side

LIMITS = Limits(1 << 20, 10, window_bytes=1 << 18)
HEADERS = [
    (":method", "POST"), (":scheme", "http"), (":path", "/t.T/echo"), (":authority", "x"),
]  # fmt: skip

said = st.tuples(
    st.integers(0, 2),
    st.binary(max_size=40),
    st.sampled_from(["plain", "plain", "padded", "last", "ping", "window", "whole window"]),
)


def client_bytes(what: list[tuple[int, bytes, str]], long_headers: bool) -> bytes:
    """What a client says on three streams."""
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    more = [("x-long", "y" * 20_000)] if long_headers else []  # goes on in other frames
    streams = [client.get_next_available_stream_id()]
    client.send_headers(streams[0], HEADERS)
    for headers in (HEADERS, [*HEADERS, *more]):
        streams.append(client.get_next_available_stream_id())
        client.send_headers(streams[-1], headers)
    ended: set[int] = set()
    for number, data, kind in what:
        stream = streams[number]
        if kind == "ping":
            client.ping(b"12345678")
        elif kind == "window":
            client.increment_flow_control_window(1 + len(data), stream)
        elif kind == "whole window":
            client.increment_flow_control_window(1 + len(data))
        elif stream not in ended:
            pad = 5 if kind == "padded" else None
            client.send_data(stream, data, end_stream=kind == "last", pad_length=pad)
            if kind == "last":
                ended.add(stream)
    return client.data_to_send()


def begun() -> H2Connection:
    protocol = server_side(LIMITS)
    protocol.initiate_connection()
    protocol.data_to_send()
    return protocol


class Seen:
    """What of the streams came out."""

    def __init__(self) -> None:
        self.data: dict[int, bytes] = defaultdict(bytes)
        self.ended: list[int] = []
        self.grown: list[int] = []

    def events(self, events: list[Any]) -> None:
        for event in events:
            if isinstance(event, DataReceived):
                self.data[event.stream_id] += event.data
            elif isinstance(event, StreamEnded):
                self.ended.append(event.stream_id)
            elif isinstance(event, WindowUpdated):
                self.grown.append(event.stream_id)

    def state(self, protocol: H2Connection) -> tuple[Any, ...]:
        windows = {n: s.inbound_flow_control_window for n, s in protocol.streams.items()}
        states = {n: s.state_machine.state for n, s in protocol.streams.items()}
        sent = [protocol.outbound_flow_control_window]
        sent += [s.outbound_flow_control_window for s in protocol.streams.values()]
        came = dict(self.data), self.ended, protocol.inbound_flow_control_window, windows, states
        return *came, sent, self.grown


@settings(max_examples=60, deadline=None)
@given(st.lists(said, max_size=12), st.booleans(), st.lists(st.integers(1, 3000), max_size=8))
def test_it_comes_to_the_same(
    what: list[tuple[int, bytes, str]], long_headers: bool, cuts: list[int]
) -> None:
    raw = client_bytes(what, long_headers)
    alone, both = begun(), begun()
    expected, seen = Seen(), Seen()
    expected.events(alone.receive_data(raw))
    bounds = [0, *itertools.accumulate(cuts), len(raw)]
    for start, end in itertools.pairwise(sorted(min(bound, len(raw)) for bound in bounds)):
        for part in parts(both, raw[start:end]) if end > start else ():
            if isinstance(part, Data):
                seen.data[part.stream_id] += part.data
                seen.ended += [part.stream_id] if part.last else []
            elif isinstance(part, Grown):
                seen.grown.append(part.stream_id)
            else:
                seen.events(both.receive_data(part))
    for data in (expected.data, seen.data):
        for stream in [stream for stream, content in data.items() if not content]:
            del data[stream]
    assert seen.state(both) == expected.state(alone)
    assert both.data_to_send() == alone.data_to_send()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 3]), st.integers(0, 16_384), st.booleans())))
def test_bytes_that_were_taken_count_as_h2_counts_them(
    frames: list[tuple[int, int, bool]],
) -> None:
    """Also when they are taken late, and where the client is owed word of it."""
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    alone, both = begun(), begun()
    for stream in (1, 3):
        client.send_headers(stream, HEADERS)
    owed: list[tuple[int, int]] = []
    for stream, size, now in frames:
        if size <= client.local_flow_control_window(stream):
            client.send_data(stream, bytes(size))
            owed.append((stream, size))
        raw = client.data_to_send()
        alone.receive_data(raw)
        both.receive_data(raw)
        while now and owed:
            stream, size = owed.pop(0)
            alone.acknowledge_received_data(size, stream)
            if not taken(both, stream, size):
                both.acknowledge_received_data(size, stream)
        assert Seen().state(both) == Seen().state(alone)
        said = alone.data_to_send()
        assert both.data_to_send() == said
        client.receive_data(said)


PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

asked = st.tuples(
    st.sampled_from(
        ["open", "open", "open", "open", "again", "reset", "settings", "smaller table"]
    ),
    st.sampled_from(["60S", "60S", "60S", "1H", "7M", "x" * 900]),  # the last pushes others out
    st.booleans(),
)


def calls(what: list[tuple[str, str, bool]]) -> bytes:
    """What a client says that calls one method, with one deadline or another."""
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    streams: list[int] = []
    for kind, timeout, length in what:
        if kind in ("open", "again") or not streams:
            stream = client.get_next_available_stream_id()
            more = [("content-length", "3")] if length else []
            # Only deadlines go into the table, so that the same place comes to mean another one.
            kept_out = [NeverIndexedHeaderTuple(name, value) for name, value in HEADERS]
            client.send_headers(stream, [*kept_out, ("grpc-timeout", timeout), *more])
            client.send_data(stream, b"abc", end_stream=True)
            streams.append(stream)
        elif kind == "reset":
            client.reset_stream(streams.pop())
        elif kind == "settings":
            client.update_settings({4: 1000})
        else:
            client.encoder.header_table_size = 200
    raw = client.data_to_send()
    if any(kind == "again" for kind, _, _ in what):  # a stream that was there already
        raw += [frame for frame in frames(raw) if frame[3] == 1][-1]
    return raw


def frames(raw: bytes) -> Iterator[bytes]:
    """The preface, then each frame."""
    yield raw[:PREFACE]
    at = PREFACE
    while at < len(raw):
        end = at + 9 + int.from_bytes(raw[at : at + 3])
        yield raw[at:end]
        at = end


class Calls:
    """What came of them at a server's end; h2 tells of headers, which stand for what they ask."""

    def __init__(self, known: KnownBlocks | None) -> None:
        self.protocol = begun()
        self.known = known
        self.seen: list[Any] = []
        self.short = 0

    def hear(self, raw: bytes) -> None:
        """h2 alone takes one frame after the other: what it had understood before one that is wrong
        would be lost."""
        heard = (raw[:PREFACE], raw[PREFACE:]) if self.known else frames(raw)
        try:
            for data in heard:
                for part in parts(self.protocol, data, self.known) if self.known else (data,):
                    self._part(part)
        except ProtocolError as error:
            self.seen.append(type(error))

    def _part(self, part: Any) -> None:
        if isinstance(part, Opened):
            self.seen.append((part.stream_id, part.asked))
            self.short += 1
        elif isinstance(part, Data):
            self.seen.append((part.stream_id, part.data))
        elif isinstance(part, bytes):
            for event in self.protocol.receive_data(part):
                self._event(event)

    def _event(self, event: Any) -> None:
        if isinstance(event, RequestReceived):
            headers = cast(Opening, tuple(event.headers))
            self.seen.append((event.stream_id, headers))
            stream = self.protocol.streams.get(event.stream_id)
            if self.known is not None and stream is not None:
                self.known.learn(self.protocol, stream, headers)
        elif isinstance(event, DataReceived):
            self.seen.append((event.stream_id, event.data))
        elif isinstance(event, StreamReset):
            self.seen.append(event.stream_id)


@settings(max_examples=100, deadline=None)
@given(st.lists(asked, min_size=1, max_size=30))
def test_calls_with_known_headers_are_opened_as_h2_opens_them(
    what: list[tuple[str, str, bool]],
) -> None:
    """More of them than may be open, too."""
    alone, both = Calls(None), Calls(KnownBlocks())
    raw = calls(what)
    alone.hear(raw)
    both.hear(raw)
    assert both.seen == alone.seen
    assert both.protocol.streams.keys() == alone.protocol.streams.keys()
    states = [
        {n: s.state_machine.state for n, s in e.protocol.streams.items()} for e in (alone, both)
    ]
    assert states[0] == states[1]
    assert both.protocol.data_to_send() == alone.protocol.data_to_send()


def test_the_same_place_in_the_table_may_come_to_mean_another_header() -> None:
    alone, both = Calls(None), Calls(KnownBlocks())
    raw = calls([("open", timeout, False) for timeout in ("60S", "60S", "60S", "1H", "1H", "1H")])
    alone.hear(raw)
    both.hear(raw)
    assert both.short == 2
    assert both.seen == alone.seen


def test_a_call_that_came_before_is_known() -> None:
    both = Calls(KnownBlocks())
    both.hear(calls([("open", "60S", False)] * 5))
    assert both.short == 3  # the first fills the table, the second is learned
    assert [stream for stream, _ in both.seen[::2]] == [1, 3, 5, 7, 9]
