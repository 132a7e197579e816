"""The client's end of a connection, with the server's of our own and with gRPC's own library."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from h2.settings import SettingCodes

from cluster.rpc.client import CallFailed, ClientConnection, connected
from cluster.rpc.limits import Limits
from tests.integration.rpc_serving import Methods, Raw, serving

LIMITS = Limits(4 << 20, 0, window_bytes=1 << 20)
WAIT = 10.0
MESSAGES = [b"", b"a", os.urandom(16_384), os.urandom(100_000), os.urandom(1_000_000), b"z"]


class Strict(Methods):
    """Refuses a call in words that a status has to encode."""

    async def refuses(self, request: bytes, call: Any) -> bytes:
        more = (("grpc-status-details-bin", b"\x08\x05more"),)
        await call.abort(grpc.StatusCode.NOT_FOUND, "not here: 100 % → elsewhere", more)
        return b""


@contextlib.asynccontextmanager
async def grpc_serving() -> AsyncIterator[str]:
    """The same methods behind grpc.aio."""
    methods = Strict()
    server = grpc.aio.server()
    handlers: dict[str, Any] = {
        "echo": grpc.unary_unary_rpc_method_handler(methods.echo),
        "slow": grpc.unary_unary_rpc_method_handler(methods.slow),
        "each": grpc.stream_stream_rpc_method_handler(methods.each),
        "refuses": grpc.unary_unary_rpc_method_handler(methods.refuses),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def own_serving() -> AsyncIterator[str]:
    async with serving() as (_, server, address):
        refuses = grpc.unary_unary_rpc_method_handler(Strict().refuses, bytes, bytes)
        server.add_registered_method_handlers("t.T", {"refuses": refuses})
        yield address


@pytest.fixture(params=["own", "grpc"])
async def connection(request: pytest.FixtureRequest) -> AsyncIterator[ClientConnection]:
    serve = own_serving if request.param == "own" else grpc_serving
    async with serve() as address, connected(address, LIMITS, WAIT) as made:
        yield made


async def test_messages_cross_whole_and_in_order(connection: ClientConnection) -> None:
    received: list[bytes] = []
    call = connection.open("/t.T/each", (("x-more", "metadata"),), received.append)
    for message in MESSAGES:
        call.send(message)
    call.send_no_more()
    async with asyncio.timeout(WAIT):
        await call.finished
    assert received == MESSAGES


async def test_more_than_both_ends_hold_crosses_both_ways(connection: ClientConnection) -> None:
    """Neither end waits for the other to read what it has sent before it reads itself."""
    received: list[int] = []
    call = connection.open("/t.T/each", (), lambda message: received.append(len(message)))
    for _ in range(40):
        call.send(bytes(500_000))
    call.send_no_more()
    async with asyncio.timeout(3 * WAIT):
        await call.finished
    assert received == [500_000] * 40


async def test_one_message_each_way(connection: ClientConnection) -> None:
    assert await connection.ask("/t.T/echo", (), b"hello", WAIT) == b"hello"
    assert await connection.ask("/t.T/echo", (), b"", WAIT) == b""


async def test_a_status_ends_a_call_with_its_words(connection: ClientConnection) -> None:
    with pytest.raises(CallFailed) as caught:
        await connection.ask("/t.T/refuses", (), b"", WAIT)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.details == "not here: 100 % → elsewhere"
    assert caught.value.status == b"\x08\x05more"
    with pytest.raises(CallFailed) as caught:
        await connection.ask("/t.T/nothing", (), b"", WAIT)
    assert (caught.value.code, caught.value.status) == (grpc.StatusCode.UNIMPLEMENTED, b"")


async def test_no_answer_in_time(connection: ClientConnection) -> None:
    with pytest.raises(CallFailed) as caught:
        await connection.ask("/t.T/slow", (), b"", 0.05)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await connection.ask("/t.T/echo", (), b"still up", WAIT) == b"still up"


async def test_a_call_has_begun_once_the_server_says_so(connection: ClientConnection) -> None:
    received: asyncio.Queue[bytes] = asyncio.Queue()
    call = connection.open("/t.T/each", (), received.put_nowait)
    call.send(b"one")
    async with asyncio.timeout(WAIT):
        await call.begun
        assert await received.get() == b"one"
    call.cancel()
    with pytest.raises(CallFailed) as caught:
        await call.finished
    assert caught.value.code is grpc.StatusCode.CANCELLED


async def test_calls_end_with_their_server() -> None:
    async with serving() as (_, server, address), connected(address, LIMITS, WAIT) as connection:
        call = connection.open("/t.T/each", (), lambda _: None)
        call.send(b"one")
        async with asyncio.timeout(WAIT):
            await call.begun
            await server.stop(0)
            with pytest.raises(CallFailed) as caught:
                await call.finished
        assert caught.value.code is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(CallFailed):
            await connection.ask("/t.T/echo", (), b"", WAIT)


async def test_nobody_there() -> None:
    with pytest.raises(CallFailed) as caught:
        async with connected("127.0.0.1:1", LIMITS, WAIT):
            raise AssertionError("somebody is there")
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_keeps_no_table_can_read_every_answer() -> None:
    """Headers that are packed once do not come before word of a table's new size."""
    async with serving() as (_, _, address):
        raw = await Raw.connect(address)
        raw.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 0})
        for _ in range(3):
            stream = raw.open()
            raw.h2.send_data(stream, bytes(5), end_stream=True)
            raw.send()
            assert (await raw.answer())[":status"] == "200"
        raw.writer.close()
