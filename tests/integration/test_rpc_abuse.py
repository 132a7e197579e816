"""What a client may do to the router's gRPC server before it has shown who it is: nothing of it is
kept, nothing of it holds others up."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2
from h2.events import DataReceived, SettingsAcknowledged, TrailersReceived
from h2.settings import SettingCodes

from cluster.rpc import endpoint
from cluster.rpc.call import Call
from cluster.rpc.connection import Connection
from cluster.rpc.limits import Limits
from cluster.rpc.server import RpcServer
from router.listen import BATCH, INFERENCE, OPERATOR, Health
from tests.integration.rpc_serving import LIMITS, WAIT, Raw, channel, framed, refused, serving

EMPTY_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
GOAWAY = bytes((0, 0, 8, 7, 0, 0, 0, 0, 0)) + bytes(8)
WINDOW_UPDATE = bytes((0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1))
DATA_OF_NO_STREAM = bytes((0, 0, 1, 0, 0, 0, 0, 0, 0)) + b"x"


async def settled(address: str) -> Raw:
    raw = await Raw.connect(address)
    await raw.until(SettingsAcknowledged)
    return raw


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not true():  # noqa: ASYNC110 - the other end makes it true
            await asyncio.sleep(0.005)


def only(server: RpcServer) -> Connection:
    (one,) = server._connections
    return one


async def test_a_watcher_that_takes_nothing_holds_up_neither_health_nor_the_end() -> None:
    server = RpcServer(LIMITS, lambda _: ())
    health = Health(server, (INFERENCE, BATCH, OPERATOR))
    port = server.bind("127.0.0.1", 0, None)
    await health.start()
    await server.start()
    try:
        raw = await settled(f"127.0.0.1:{port}")
        raw.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        await raw.until(SettingsAcknowledged)
        watch = raw.open("/grpc.health.v1.Health/Watch")
        raw.h2.send_data(watch, framed(b""), end_stream=True)
        raw.send()
        await until(lambda: any(call.running for call in only(server).calls.values()))
        async with asyncio.timeout(WAIT):
            await health.set(True)
            await health.stop()
    finally:
        await server.stop(0.1)


async def test_a_watcher_hears_of_every_change() -> None:
    server = RpcServer(LIMITS, lambda _: ())
    health = Health(server, (INFERENCE, BATCH, OPERATOR))
    port = server.bind("127.0.0.1", 0, None)
    await health.start()
    await server.start()
    try:
        async with channel(f"127.0.0.1:{port}") as c:
            method = c.unary_stream("/grpc.health.v1.Health/Watch")
            watch = method(health_pb2.HealthCheckRequest().SerializeToString(), timeout=WAIT)
            heard = []
            for serving_now in (True, False):
                heard.append(health_pb2.HealthCheckResponse.FromString(await watch.read()).status)
                await health.set(serving_now)
            heard.append(health_pb2.HealthCheckResponse.FromString(await watch.read()).status)
            none = health_pb2.HealthCheckRequest(service="none").SerializeToString()
            unknown = await method(none, timeout=WAIT).read()
            there = health_pb2.HealthCheckRequest(service=OPERATOR).SerializeToString()
            operator = await method(there, timeout=WAIT).read()
        kinds = health_pb2.HealthCheckResponse
        assert heard == [kinds.NOT_SERVING, kinds.SERVING, kinds.NOT_SERVING]
        assert kinds.FromString(unknown).status == kinds.SERVICE_UNKNOWN
        assert kinds.FromString(operator).status == kinds.SERVING
    finally:
        await server.stop(0.1)


async def test_refused_messages_give_their_connection_its_window_back() -> None:
    """Several times what the window holds, and then a right call over the same connection."""
    async with serving() as (_, _, address), channel(address) as c:
        echo = c.unary_unary("/t.T/echo")
        for _ in range(80):
            error = await refused(echo(b"x" * ((1 << 20) + 1), timeout=WAIT))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await echo(b"y" * 20_000, timeout=WAIT) == b"y" * 20_000


async def test_calls_reset_before_they_began_give_the_window_back() -> None:
    """Several times what it holds: the client's own h2 would not send more."""
    async with serving() as (_, server, address):
        raw = await settled(address)
        for _ in range(15):
            for _ in range(15):
                stream = raw.open()
                raw.h2.send_data(stream, framed(bytes(16_000)))
                raw.send()
                await until(lambda: any(c.inbox.waiting for c in only(server).calls.values()))
                raw.h2.reset_stream(stream, 8)
                raw.send()
                await until(lambda: not only(server).calls)
            other = raw.open()
            raw.h2.send_data(other, framed(b"x"), end_stream=True)
            assert dict((await raw.until(TrailersReceived)).headers)["grpc-status"] == "0"


async def test_a_call_that_is_cancelled_before_its_first_step_is_over() -> None:
    async with serving() as (_, server, address):
        raw = await settled(address)
        for _ in range(50):
            stream = raw.open("/t.T/slow")
            raw.h2.send_data(stream, framed(b"x"), end_stream=True)
            raw.h2.reset_stream(stream, 8)
            raw.send()
            await asyncio.sleep(0.002)
        await until(lambda: only(server).calls == {})


async def test_a_read_full_of_window_updates_looks_at_each_call_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as (_, server, address):
        raw = await settled(address)
        for _ in range(50):
            raw.open()
        raw.send()
        await until(lambda: len(only(server).calls) == 50)
        looked: list[int] = []
        monkeypatch.setattr(Call, "pump", lambda call: looked.append(call.stream_id))
        only(server).data_received(WINDOW_UPDATE * 1000 + EMPTY_SETTINGS * 100)
        assert len(looked) == 50


async def test_messages_are_unpacked_when_they_are_taken() -> None:
    """Small ones that swell, of calls that never begin, are held as small as they came."""
    async with serving() as (_, server, address):
        raw = await settled(address)
        message = framed(gzip.compress(bytes(1 << 20)), packed=1)
        for _ in range(20):
            stream = raw.open(more=[("grpc-encoding", "gzip")])
            raw.h2.send_data(stream, message)
        raw.send()
        await until(lambda: len(only(server).calls) == 20)
        await until(lambda: all(call.inbox.waiting for call in only(server).calls.values()))
        held = [m for call in only(server).calls.values() for m in call.inbox._messages]
        assert sum(len(part) for _, part, _ in held) <= 20 * len(message)


async def test_what_swells_beyond_the_limit_is_refused_when_it_is_taken() -> None:
    async with serving() as (_, _, address):
        raw = await settled(address)
        stream = raw.open(more=[("grpc-encoding", "gzip")])
        raw.h2.send_data(
            stream, framed(gzip.compress(bytes(LIMITS.message_bytes + 1)), 1), end_stream=True
        )
        assert (await raw.answer())["grpc-status"] == "8"


async def test_a_client_that_reads_nothing_is_read_no_further() -> None:
    """What it sends would each be answered, into memory."""
    async with serving() as (_, server, address):
        raw = await settled(address)
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        transport = only(server)._transport
        assert transport is not None and transport.is_reading()
        transport.write(WINDOW_UPDATE * (1 << 20))  # more than the sockets take
        assert not transport.is_reading()
        raw.reader._transport.resume_reading()  # type: ignore[attr-defined]
        while not transport.is_reading():
            async with asyncio.timeout(WAIT):
                assert await raw.reader.read(1 << 20)


async def test_a_goaway_with_more_behind_it_ends_no_call() -> None:
    async with serving() as (methods, server, address):
        raw = await settled(address)
        flood = raw.open("/t.T/flood")
        raw.h2.send_data(flood, framed(b""), end_stream=True)
        await raw.answer()
        raw.send(GOAWAY + WINDOW_UPDATE + EMPTY_SETTINGS)
        await asyncio.sleep(0.05)
        assert not methods.cancelled.is_set() and len(only(server).calls) == 1
        raw.h2.increment_flow_control_window(1 << 25)
        raw.h2.increment_flow_control_window(1 << 25, flood)
        got = 0
        while got < 1000 * 10_005:
            got += len((await raw.until(DataReceived)).data)
        assert got == 1000 * 10_005


async def test_a_broken_connection_whose_client_does_not_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint, "LINGER_SECONDS", 0.3)
    async with serving(Limits(1 << 20, 100)) as (methods, server, address):
        raw = await settled(address)
        slow = raw.open("/t.T/slow")
        raw.h2.send_data(slow, framed(b"x"), end_stream=True)
        raw.send()
        await until(lambda: any(call.running for call in only(server).calls.values()))
        raw.reader._transport.pause_reading()  # type: ignore[attr-defined]
        transport = only(server)._transport
        assert transport is not None
        transport.write(bytes(16 << 20))  # more than the sockets take
        raw.send(DATA_OF_NO_STREAM)
        only(server).resume_writing()  # it would not be read otherwise
        await until(lambda: not server._connections)
        await asyncio.wait_for(methods.cancelled.wait(), WAIT)


async def test_a_client_does_not_choose_how_much_of_its_text_is_remembered() -> None:
    async with serving() as (_, server, address):
        raw = await settled(address)
        raw.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: (1 << 32) - 1})
        await raw.until(SettingsAcknowledged)
        assert only(server)._h2.encoder.header_table_size <= 4096


async def test_a_method_is_cancelled_once() -> None:
    """So that it can clean up: the reset is one reason to end it, the end of the connection is no
    other."""
    async with serving() as (_, server, address):
        cancels: list[str] = []

        async def slow(request: bytes, call: Call) -> bytes:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancels.append("first")
                try:
                    await asyncio.sleep(0.2)
                except asyncio.CancelledError:
                    cancels.append("second")
                cancels.append("cleaned up")
                raise
            return b""

        server._methods["/t.T/slow"] = grpc.unary_unary_rpc_method_handler(slow, bytes, bytes)
        raw = await settled(address)
        stream = raw.open("/t.T/slow")
        raw.h2.send_data(stream, framed(b"x"), end_stream=True)
        raw.send()
        await until(lambda: any(call.running for call in only(server).calls.values()))
        raw.h2.reset_stream(stream, 8)
        raw.send()
        await until(lambda: bool(cancels))
        raw.writer.transport.abort()
        await until(lambda: "cleaned up" in cancels)
        assert cancels == ["first", "cleaned up"]


@pytest.mark.parametrize("pieces", [1, 2, 9])
async def test_a_frame_that_is_too_long_is_not_waited_for(pieces: int) -> None:
    server = RpcServer(LIMITS, lambda _: ())
    port = server.bind("127.0.0.1", 0, None)
    await server.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EMPTY_SETTINGS)
        header = b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"
        step = len(header) // pieces
        for start in range(0, len(header), step):
            writer.write(header[start : start + step])
            await writer.drain()
            await asyncio.sleep(0.01)
        async with asyncio.timeout(WAIT):
            while await reader.read(1024):
                pass
        writer.close()
    finally:
        await server.stop(0.1)
