"""gRPC over HTTP/2, part by part: messages, metadata, deadlines, what a peer may not do."""

from __future__ import annotations

import gzip
import zlib

import pytest
from h2.connection import H2Connection
from h2.exceptions import TooManyStreamsError

from cluster.rpc.abuse import PING_SECONDS, PING_STRIKES, RESETS_A_SECOND, Abuse
from cluster.rpc.headers import BadHeaders, metadata, request, timeout_seconds, trailers
from cluster.rpc.inbox import PREFIX, BadMessage, Inbox
from cluster.rpc.limits import Limits
from cluster.rpc.protocol import FEW_STREAMS, client_side, server_side
from pdserve.v1 import inference_pb2
from router.delta_wire import DeltaEncoder
from router.output import Delta, FinishReason, Logprob, TokenLogprobs


def inbox(limit: int = 100, encoding: str = "identity") -> tuple[Inbox, list[int]]:
    received: list[int] = []
    return Inbox(limit, encoding, received.append), received


def framed(message: bytes, packed: int = 0) -> bytes:
    return PREFIX.pack(packed, len(message)) + message


@pytest.mark.parametrize("cut", range(1, 19))
async def test_messages_come_out_however_their_bytes_are_cut(cut: int) -> None:
    box, received = inbox()
    raw = framed(b"one") + framed(b"") + framed(b"three")
    for part in (raw[:cut], raw[cut:]):
        if part:
            box.feed(part, len(part))
    box.end()
    assert [await box.next() for _ in range(4)] == [b"one", b"", b"three", None]
    assert sum(received) == len(raw)


def test_a_message_that_waits_is_not_counted_as_received() -> None:
    box, received = inbox()
    box.feed(framed(b"one"), 8)
    assert sum(received) == 0
    assert box.take() == b"one"
    assert sum(received) == 8


@pytest.mark.parametrize(
    ("raw", "encoding", "too_large"),
    [
        (PREFIX.pack(0, 101), "identity", True),
        (framed(gzip.compress(b"x" * 101), 1), "gzip", True),
        (framed(b"not gzip", 1), "gzip", False),
        (framed(gzip.compress(b"x")[:-4], 1), "gzip", False),
        (framed(b"x", 1), "identity", False),
        (framed(b"x", 2), "gzip", False),
    ],
)
def test_bad_messages(raw: bytes, encoding: str, too_large: bool) -> None:
    box, _ = inbox(encoding=encoding)
    with pytest.raises(BadMessage) as caught:
        box.feed(raw, len(raw))
        box.take()
    assert caught.value.too_large is too_large


def test_a_stream_that_ends_within_a_message() -> None:
    box, _ = inbox()
    box.feed(framed(b"one")[:-1], 7)
    with pytest.raises(BadMessage):
        box.end()


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_messages(encoding: str, pack: object) -> None:
    box, _ = inbox(encoding=encoding)
    packed = pack(b"x" * 100)  # type: ignore[operator]
    box.feed(framed(packed, 1) + framed(b"plain"), 99)
    assert [box.take(), box.take()] == [b"x" * 100, b"plain"]


@pytest.mark.parametrize(
    ("value", "seconds"), [("1H", 3600), ("5S", 5), ("20m", 0.02), ("7u", 7e-6), ("99999999n", 0.1)]
)
def test_timeouts(value: str, seconds: float) -> None:
    assert timeout_seconds(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "S", "5", "-5S", "123456789S", "5s", "1.5S", " 5S"])
def test_bad_timeouts(value: str) -> None:
    with pytest.raises(BadHeaders):
        timeout_seconds(value)


def test_metadata_leaves_out_what_is_the_protocols() -> None:
    found = metadata(
        [(":path", "/x"), ("te", "trailers"), ("grpc-timeout", "1S"), ("a", "b"), ("k-bin", "AQI")]
    )
    assert found == (("a", "b"), ("k-bin", b"\1\2"))
    with pytest.raises(BadHeaders):
        metadata([("k-bin", "!")])


def test_a_status_is_written_so_that_any_text_survives() -> None:
    found = dict(trailers(3, "50 % of ä\n", (("d-bin", b"\1\2"),)))
    assert found == {
        "grpc-status": "3", "grpc-message": "50 %25 of %C3%A4%0A", "d-bin": "AQI"
    }  # fmt: skip


def test_pings_without_need_are_abuse_and_those_after_an_answer_are_not() -> None:
    abuse = Abuse()
    assert all(abuse.pinged(i * PING_SECONDS) for i in range(10))
    for _ in range(100):
        abuse.answered()
        assert abuse.pinged(1e3)
    assert [abuse.pinged(1e3) for _ in range(PING_STRIKES + 1)] == [True] * PING_STRIKES + [False]


def test_resets_faster_than_they_can_matter_are_abuse() -> None:
    abuse = Abuse()
    assert all(abuse.reset(10.5) for _ in range(RESETS_A_SECOND))
    assert abuse.reset(11.0)
    assert not all(abuse.reset(12.0) for _ in range(RESETS_A_SECOND + 1))


@pytest.mark.parametrize(
    "delta",
    [
        Delta(0, 0, (5,), "word"),
        Delta(3, 7, (1, 2, 300), "x" * 500, text_offset=9),
        Delta(0, 1, (), "", (), FinishReason.STOP, "end"),
        Delta(0, 1, (4,), "a", (), FinishReason.STOP, 4),
        Delta(0, 1, (4,), "a", (TokenLogprobs(Logprob(4, -0.5, 1, "a")),), FinishReason.LENGTH),
        Delta(0, 0, tuple(range(9000)), "ä" * 9000),
    ],
)
def test_an_encoder_writes_what_protobuf_would(delta: Delta) -> None:
    encode = DeltaEncoder("a-request")
    encode(Delta(1, 2, (3,), "left from before", text_offset=4))
    message = inference_pb2.GenerateResponse.FromString(encode(delta))
    assert message.request_id == "a-request"
    assert message.WhichOneof("event") == "delta"
    found = message.delta
    assert (found.index, found.offset, found.text) == (delta.index, delta.offset, delta.text)
    assert tuple(found.token_ids) == delta.token_ids
    assert found.text_offset == delta.text_offset
    assert [e.sampled.token_id for e in found.logprobs] == [
        e.sampled.token_id for e in delta.logprobs
    ]
    assert bool(found.finish_reason) is (delta.finish is not None)
    stop = found.WhichOneof("stop")
    assert (getattr(found, stop) if stop else None) == delta.stop


def connection(calls: int) -> tuple[H2Connection, H2Connection]:
    """A client's end and a server's that takes so many calls at once."""
    client, server = client_side(Limits(1000, 0)), server_side(Limits(1000, calls))
    client.initiate_connection()
    server.initiate_connection()
    for _ in range(2):
        server.receive_data(client.data_to_send())
        client.receive_data(server.data_to_send())
    return client, server


def opened(client: H2Connection, server: H2Connection) -> int:
    stream_id = client.get_next_available_stream_id()
    client.send_headers(stream_id, request("a", "/b", ()))
    server.receive_data(client.data_to_send())
    return stream_id


def ended(client: H2Connection, server: H2Connection, stream_id: int) -> None:
    client.reset_stream(stream_id)
    server.receive_data(client.data_to_send())


def test_streams_are_not_looked_through_whenever_one_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = []
    look = H2Connection._open_streams

    def counted(self: H2Connection, remainder: int) -> int:
        looked.append(len(self.streams))
        return look(self, remainder)

    monkeypatch.setattr(H2Connection, "_open_streams", counted)
    client, server = connection(10_000)
    for _ in range(2000):
        opened(client, server)
    assert sum(looked) < 2 * 2 * 2000  # at either end, and 2000 times as many otherwise
    assert client.open_outbound_streams == server.open_inbound_streams == 2000


def test_closed_streams_are_dropped_and_the_limit_counts_open_ones() -> None:
    client, server = connection(10)
    held = [opened(client, server) for _ in range(9)]
    for _ in range(10 * FEW_STREAMS):
        ended(client, server, opened(client, server))
        assert max(len(client.streams), len(server.streams)) < 3 * FEW_STREAMS
    held.append(opened(client, server))
    with pytest.raises(TooManyStreamsError):
        opened(client, server)
    ended(client, server, held[0])
    opened(client, server)
    client.remote_settings.acknowledge()
    client.remote_settings.max_concurrent_streams = 11  # what a client may think that it may
    client.remote_settings.acknowledge()
    with pytest.raises(TooManyStreamsError, match="inbound"):
        opened(client, server)
