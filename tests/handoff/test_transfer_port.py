"""Bad input at the transfer port: whatever a stranger sends, it is logged or closed, costs next to
nothing, and a right handoff goes through right after."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import AsyncIterator

import grpc.aio
import psutil
import pytest

from cluster.kv.transport.frames import CONTROL_BYTES, Open, Refused, encode_frame
from cluster.ticket import MAX_TICKET_BYTES, TicketSigner
from tests.handoff.agents import (
    TOKENS,
    Decode,
    Prefill,
    make_ticket,
    random_cache,
    sign,
    start_agent,
)
from tests.handoff.http2 import connect, data_frame, dial, ping, stream_headers
from tests.handoff.raw import RawPeer, landed

MIB = 1 << 20
IDLE_CONNECTIONS = 10_000

TLS_HELLO = bytes.fromhex(
    "16030100a5010000a10303" + "7a" * 32 + "20" + "5c" * 32 + "0020" + "1301" * 16 + "0100"
) + bytes(40)
HTTP_1 = b"POST /v1/kv HTTP/1.1\r\nHost: decode\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000
NOISE = bytes((i * 131 + 17) % 256 for i in range(64 << 10))


async def right_handoff(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(2 * TOKENS)
    decode.reserve(ticket, sign(ticket), (12, 13))
    prefill.offer(ticket, sign(ticket), decode.agent.address, (3, 4))
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (3, 4), (12, 13))
    await prefill.until(lambda: f"p-{ticket.handoff_id}" in prefill.finished.sending)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


@pytest.fixture
async def bounded(prefill: Prefill, decode: Decode) -> AsyncIterator[None]:
    """The process, that holds both agents, does not grow by more than 64 MiB: what they take at
    their first handoff – NCCL's part of a link – they have by then."""
    await right_handoff(prefill, decode)
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    yield
    grown = process.memory_info().rss - before
    assert grown < 64 * MIB, f"grew by {grown / MIB:.0f} MiB"


def read_to_end(port: socket.socket) -> None:
    """Until the other side closes, in whatever way."""
    with contextlib.suppress(ConnectionError):
        while port.recv(65536):
            pass


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    "garbage",
    [HTTP_1, TLS_HELLO, NOISE, b"\0" * 1000, b"\x80\x04\x95pickle." * 100],
    ids=["HTTP/1", "a TLS hello", "noise", "zeros", "a pickle"],
)
async def test_another_protocol_is_closed(prefill: Prefill, decode: Decode, garbage: bytes) -> None:
    with dial(decode.agent.address) as port:
        with contextlib.suppress(ConnectionError):  # it may be closed while we still send
            port.sendall(garbage)
        await asyncio.to_thread(read_to_end, port)
    await right_handoff(prefill, decode)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("claimed", [0xFFFFFFFF, 1 << 31, 64 << 20])
async def test_a_length_prefix_of_gigabytes_reserves_nothing(
    prefill: Prefill, decode: Decode, claimed: int
) -> None:
    with connect(decode.agent.address) as port:
        port.sendall(stream_headers(1))
        port.sendall(data_frame(1, b"\x12" * 1000, claimed))
        await right_handoff(prefill, decode)  # beside it
    await right_handoff(prefill, decode)


@pytest.mark.usefixtures("bounded")
async def test_one_that_takes_no_reply_is_not_waited_for(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets nothing be sent to it: its pushes end all the same."""
    monkeypatch.setattr("cluster.kv.transport.grpc_streams.REPLY_SECONDS", 0.2)
    tasks = len(asyncio.all_tasks(decode.agent._loop))
    with connect(decode.agent.address, window=0) as port:
        for stream in range(1, 41, 2):
            port.sendall(stream_headers(stream) + data_frame(stream, b"\x0a\x03\x0a\x01x"))
        await right_handoff(prefill, decode)
        await decode.until(lambda: len(asyncio.all_tasks(decode.agent._loop)) <= tasks + 2)
    await right_handoff(prefill, decode)


@pytest.mark.usefixtures("bounded")
async def test_one_that_asks_and_reads_no_answer_is_dropped(
    prefill: Prefill, decode: Decode
) -> None:
    with connect(decode.agent.address) as port, contextlib.suppress(ConnectionError):
        port.settimeout(60)
        for _ in range(300):
            await asyncio.to_thread(port.sendall, ping() * 10_000)
        pytest.fail("51 MB of questions were taken")
    await right_handoff(prefill, decode)


@pytest.mark.usefixtures("bounded")
async def test_garbage_behind_a_right_preface(prefill: Prefill, decode: Decode) -> None:
    with connect(decode.agent.address) as port:
        with contextlib.suppress(ConnectionError):
            port.sendall(NOISE)
        await asyncio.to_thread(read_to_end, port)
    await right_handoff(prefill, decode)


@pytest.mark.usefixtures("bounded")
async def test_a_message_over_the_limit_never_reaches_the_agent(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
        await peer.push(Open(wire, 0), b"\x7a" + b"\x00" * MIB)
    assert (await decode.result(ticket.handoff_id)).error
    await right_handoff(prefill, decode)


async def test_a_method_that_is_not_there(prefill: Prefill, decode: Decode) -> None:
    async with grpc.aio.insecure_channel(decode.agent.address) as channel:
        call = channel.stream_stream("/pdserve.v1.KvTransfer/Pull")()
        with pytest.raises(grpc.aio.AioRpcError) as unimplemented:
            await call.read()
    assert unimplemented.value.code() == grpc.StatusCode.UNIMPLEMENTED
    await right_handoff(prefill, decode)


async def test_a_crowd_of_idle_connections(prefill: Prefill, decode: Decode) -> None:
    """10,000, or as many as this process may open files for: both ends of each are in it. They
    take memory by the connection, a few pages each, and not by what each might send."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    process = psutil.Process(os.getpid())
    count = min(IDLE_CONNECTIONS, (soft - process.num_fds() - 500) // 2)
    before = process.memory_info().rss
    assert count > 100, "too few open files are allowed to try this"
    with contextlib.ExitStack() as crowd:
        for _ in range(count):
            crowd.enter_context(dial(decode.agent.address))
        await right_handoff(prefill, decode)
        grown = process.memory_info().rss - before
    await right_handoff(prefill, decode)
    print(f"{count} idle connections: {grown / count / 1024:.1f} KiB each, both ends")
    assert grown < 64 * MIB + count * (32 << 10)


async def test_a_connection_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.kv.transport.grpc.HANDSHAKE_SECONDS", 0.3)
    agent = start_agent("decode", random_cache(2, worker="decode"))
    try:
        with dial(agent.address) as port:
            async with asyncio.timeout(30):
                await asyncio.to_thread(read_to_end, port)
    finally:
        agent.stop()


@pytest.mark.usefixtures("bounded")
async def test_a_crowd_of_pushes_that_show_nothing(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends by itself, and right ones go on beside them, on connections of their own."""
    monkeypatch.setattr("cluster.kv.receiver.OPEN_TIMEOUT_SECONDS", 0.5)
    peers = [RawPeer(decode) for _ in range(10)]
    pushes = [peer.begin() for peer in peers for _ in range(50)]
    await right_handoff(prefill, decode)
    async with asyncio.timeout(10):
        assert await asyncio.gather(*(push.replies() for push in pushes)) == [[]] * len(pushes)
    for peer in peers:
        await peer.close()
    await right_handoff(prefill, decode)


@pytest.mark.parametrize(
    "wire",
    [
        b"\x0a" + b"\xff" * 2000,
        encode_frame(Open(b"x" * 2000, 0)),
        encode_frame(Open(sign(make_ticket(TOKENS)).replace(b"8", b"9"), 0)),
        encode_frame(Open(b'{"a":' * 700 + b"." + b"0" * 64, 0)),
    ],
    ids=["no frame", "no ticket", "a forged ticket", "a deep one"],
)
async def test_a_push_without_a_ticket_is_looked_at_once(
    prefill: Prefill,
    decode: Decode,
    peer: RawPeer,
    wire: bytes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At most one HMAC of at most 4 KiB; no JSON is parsed, nothing is remembered, a line a
    second is logged. Measured here: the time of a refusal, from the connection's other end."""
    macs: list[int] = []
    mac = TicketSigner._mac

    def counted(self: TicketSigner, payload: bytes) -> bytes:
        macs.append(len(payload))
        return mac(self, payload)

    def parsed(payload: bytes) -> None:
        pytest.fail("an unsigned ticket was parsed")

    monkeypatch.setattr(TicketSigner, "_mac", counted)
    monkeypatch.setattr("cluster.ticket._parse", parsed)
    pushes = 50
    with caplog.at_level(logging.INFO, "cluster.kv"):
        started = time.perf_counter()
        for _ in range(pushes):
            assert isinstance((await peer.push(wire))[-1], Refused)
        took = time.perf_counter() - started
        each = took / pushes
    print(f"a push without a ticket: {each * 1e6:.0f} µs, both ends and the round trip included")
    assert len(macs) <= pushes and all(size <= MAX_TICKET_BYTES for size in macs)
    assert 1 <= len(caplog.records) <= 1 + took
    doorkeeper = decode.agent.receiver._doorkeeper
    assert not doorkeeper._spent._until and not doorkeeper._closed._until
    assert decode.pinned() == 0
    monkeypatch.undo()
    await right_handoff(prefill, decode)


async def test_a_long_first_frame_is_not_even_parsed(
    decode: Decode, peer: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdserve.v1 import kv_transfer_pb2 as pb

    long = encode_frame(Open(b"x" * CONTROL_BYTES, 0))
    monkeypatch.setattr(pb, "PushFrame", None)  # parsing would fail differently
    assert await peer.push(long) == [Refused("a frame is too long")]


async def test_two_agents_do_not_share_what_was_spent(prefill: Prefill, decode: Decode) -> None:
    """A ticket for decode, shown to prefill's own port, is for another worker there."""
    ticket = make_ticket(TOKENS)
    stranger = RawPeer(prefill)
    replies = await stranger.push(Open(sign(ticket), 0))
    assert replies == [Refused("the ticket is for another worker or another life of this one")]
    await stranger.close()
    decode.reserve(ticket, sign(ticket), (5,))
    prefill.offer(ticket, sign(ticket), decode.agent.address, (1,))
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)
