"""DATA frames taken past h2 come to the same as when h2 takes them, however bytes are cut."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, StreamEnded, WindowUpdated
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.rpc.limits import Limits
from cluster.rpc.plain_data import Data, Grown, parts, taken
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
