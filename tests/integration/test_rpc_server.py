"""The gRPC server under clients that behave and clients that do not, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from h2.events import ConnectionTerminated, DataReceived, TrailersReceived
from h2.settings import SettingCodes

from cluster.rpc.abuse import PING_STRIKES, RESETS_A_SECOND
from cluster.rpc.limits import Limits
from tests.integration.rpc_serving import WAIT, Raw, channel, framed, refused, serving


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_380, 70_000, 1 << 20])
@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_messages_of_any_size_go_both_ways(size: int, compression: Any) -> None:
    async with serving() as (_, _, address), channel(address) as c:
        message = bytes(i % 251 for i in range(size))
        got = await c.unary_unary("/t.T/echo")(message, timeout=WAIT, compression=compression)
        assert got == message


async def test_streams_both_ways_larger_than_any_window() -> None:
    async with serving() as (_, _, address), channel(address) as c:

        async def requests() -> AsyncIterator[bytes]:
            for i in range(100):
                yield bytes((i,)) * 50_000

        got = [m async for m in c.stream_stream("/t.T/each")(requests(), timeout=WAIT)]
        assert got == [bytes((i,)) * 50_000 for i in range(100)]
        total = await c.stream_unary("/t.T/count")(requests(), timeout=WAIT)
        assert total == b"5000000"


async def test_a_small_message_does_not_wait_until_the_one_before_is_acknowledged() -> None:
    async with serving() as (_, server, address), channel(address) as c:
        await c.unary_unary("/t.T/echo")(b"hello", timeout=WAIT)
        (connection,) = server._connections
        assert connection._transport is not None
        accepted = connection._transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_statuses() -> None:
    async with serving() as (_, _, address), channel(address) as c:
        none = await refused(c.unary_unary("/t.T/none")(b"", timeout=WAIT))
        assert none.code() is grpc.StatusCode.UNIMPLEMENTED
        broken = await refused(c.unary_unary("/t.T/broken")(b"", timeout=WAIT))
        assert broken.code() is grpc.StatusCode.UNKNOWN
        assert "secret" not in broken.details()
        large = await refused(c.unary_unary("/t.T/echo")(b"x" * ((1 << 20) + 1), timeout=WAIT))
        assert large.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        fat = c.unary_unary("/t.T/echo")(b"", timeout=WAIT, metadata=[("k", "v" * 20_000)])
        assert (await refused(fat)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await c.unary_unary("/t.T/echo")(b"still here", timeout=WAIT) == b"still here"


async def test_a_client_that_leaves_cancels_its_method() -> None:
    async with serving() as (methods, _, address), channel(address) as c:
        call = c.unary_unary("/t.T/slow")(b"", timeout=WAIT)
        await asyncio.wait_for(methods.slow_ones.acquire(), WAIT)
        call.cancel()
        await asyncio.wait_for(methods.cancelled.wait(), WAIT)


async def test_a_deadline_ends_a_method_that_does_not_look_at_it() -> None:
    async with serving() as (methods, _, address):
        raw = await Raw.connect(address)  # no client whose own clock could end the call sooner
        slow = raw.open("/t.T/slow", more=[("grpc-timeout", "200m")])
        raw.h2.send_data(slow, framed(b""), end_stream=True)
        assert (await raw.answer())["grpc-status"] == "4"
        await asyncio.wait_for(methods.cancelled.wait(), WAIT)


async def test_a_client_that_does_not_read_holds_its_own_call_up_and_no_other() -> None:
    async with serving() as (methods, _, address):
        raw = await Raw.connect(address)
        raw.h2.increment_flow_control_window(1 << 25)  # the connection's; streams keep 64 KiB
        lazy = raw.open("/t.T/flood")
        raw.h2.send_data(lazy, struct.pack(">BI", 0, 0), end_stream=True)
        await raw.answer()
        await asyncio.sleep(0.3)
        held = methods.sent
        assert held <= 6
        other = raw.open("/t.T/echo")
        raw.h2.send_data(other, struct.pack(">BI", 0, 1) + b"x", end_stream=True)
        trailers = await raw.until(TrailersReceived)
        assert (trailers.stream_id, dict(trailers.headers)["grpc-status"]) == (other, "0")
        assert methods.sent == held
        raw.h2.increment_flow_control_window(1 << 25, lazy)
        trailers = await raw.until(TrailersReceived)
        assert (trailers.stream_id, dict(trailers.headers)["grpc-status"]) == (lazy, "0")
        assert methods.sent == 1000


async def test_a_stop_lets_calls_end_and_then_ends_them() -> None:
    async with serving() as (methods, server, address), channel(address) as c:
        lazy = aiter(c.unary_stream("/t.T/flood")(b"", timeout=WAIT))
        await anext(lazy)
        stopping = asyncio.create_task(server.stop(WAIT))
        assert len([m async for m in lazy]) == 999
        await stopping
    async with serving() as (methods, server, address), channel(address) as c:
        slow = asyncio.ensure_future(refused(c.unary_unary("/t.T/slow")(b"", timeout=WAIT)))
        await asyncio.wait_for(methods.slow_ones.acquire(), WAIT)
        await server.stop(0.1)
        assert (await slow).code() is grpc.StatusCode.UNAVAILABLE
        assert methods.cancelled.is_set()


async def test_a_window_that_grows_is_used_after_its_acknowledgement() -> None:
    """Until then the client counts by the old one, and what overflows it ends the connection."""
    async with serving() as (methods, _, address):
        raw = await Raw.connect(address)
        raw.h2.increment_flow_control_window(1 << 25)  # the connection's; streams keep 64 KiB
        lazy = raw.open("/t.T/flood")
        raw.h2.send_data(lazy, struct.pack(">BI", 0, 0), end_stream=True)
        await raw.answer()
        await asyncio.sleep(0.2)
        held = methods.sent
        raw.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 22})
        while methods.sent < held + 100:
            assert await raw.until(DataReceived) is not None, "the connection has ended"


async def test_two_messages_where_one_is_due() -> None:
    async with serving() as (_, _, address):
        raw = await Raw.connect(address)
        stream = raw.open()
        raw.h2.send_data(stream, struct.pack(">BI", 0, 1) + b"x", end_stream=False)
        raw.h2.send_data(stream, struct.pack(">BI", 0, 1) + b"y", end_stream=True)
        assert (await raw.answer())["grpc-status"] == "13"


async def test_a_call_without_a_message() -> None:
    async with serving() as (_, _, address):
        raw = await Raw.connect(address)
        raw.h2.end_stream(raw.open())
        assert (await raw.answer())["grpc-status"] == "13"


async def test_needless_pings_end_the_connection() -> None:
    async with serving() as (_, _, address):
        raw = await Raw.connect(address)
        for i in range(PING_STRIKES + 2):
            raw.h2.ping(bytes((i,)) * 8)
        goodbye = await raw.until(ConnectionTerminated)
        assert goodbye.additional_data == b"too_many_pings"


async def test_a_rapid_reset_ends_the_connection() -> None:
    async with serving() as (_, _server, address):
        raw = await Raw.connect(address)
        await raw.until(object)
        for _ in range(RESETS_A_SECOND * 3):
            raw.h2.reset_stream(raw.open())
        goodbye = await raw.until(ConnectionTerminated)
        assert goodbye is None or goodbye.additional_data == b"too_many_resets"
        async with channel(address) as c:
            assert await c.unary_unary("/t.T/echo")(b"x", timeout=WAIT) == b"x"


async def test_what_is_not_grpc() -> None:
    async with serving() as (_, _, address):
        raw = await Raw.connect(address)
        raw.open(content_type="text/plain")
        assert (await raw.answer())[":status"] == "415"
        host, port = address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), WAIT)
        assert b"HTTP/1.1" not in rest


async def test_a_silent_client_is_asked_and_then_dropped() -> None:
    limits = Limits(1 << 20, 100, keepalive_seconds=0.1, keepalive_timeout_seconds=0.1)
    async with serving(limits) as (_, _, address):
        host, port = address.rsplit(":", 1)
        reader, _ = await asyncio.open_connection(host, int(port))
        assert b"pdserve?" in await asyncio.wait_for(_all(reader), WAIT)


async def _all(reader: asyncio.StreamReader) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(65_536):
            data += part
    return data
