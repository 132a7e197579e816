"""The transfer port's streams with gRPC's own library at the other end, either way round."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import grpc.aio
import pytest

from cluster.kv.transport.streams.client import Channel
from cluster.kv.transport.streams.reading import Broken, Incoming, Reader
from cluster.kv.transport.streams.server import Server
from cluster.kv.transport.streams.stream import Stream

PATH = "/pdserve.v1.Test/Echo"
LIMIT = 20 << 20
MESSAGES = [b"", b"a", os.urandom(8192), os.urandom(100_000), os.urandom(17 << 20)]


def reader(go_on: Callable[[], None]) -> Reader:
    return Reader(LIMIT, 8192, 48, go_on)


async def echo(stream: Stream) -> None:
    while (message := await stream.receive_whole()) is not None:
        if message == b"fail":
            raise RuntimeError("as it was told to")
        await stream.send(memoryview(message)[:10], memoryview(message)[10:])


@pytest.fixture
async def server() -> AsyncIterator[str]:
    made = Server({PATH: echo}, reader, max_streams=8, handshake_seconds=5)
    port = made.bind("127.0.0.1", 0)
    made.start()
    yield f"127.0.0.1:{port}"
    await made.stop()


@pytest.fixture
async def channel(server: str) -> AsyncIterator[Channel]:
    made = Channel(server, reader)
    yield made
    made.close()


@pytest.fixture
async def grpcs_server() -> AsyncIterator[str]:
    """grpc.aio's, with its own small frames and windows."""

    async def echo(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    made = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", LIMIT),
            ("grpc.max_concurrent_streams", 8),
        ]
    )
    service, _, name = PATH[1:].partition("/")
    method = grpc.stream_stream_rpc_method_handler(echo)
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    port = made.add_insecure_port("127.0.0.1:0")
    await made.start()
    yield f"127.0.0.1:{port}"
    await made.stop(0)


async def through(stream: Stream) -> None:
    for message in MESSAGES:
        await stream.send(message)
        assert await stream.receive_whole() == message


async def test_with_itself(channel: Channel) -> None:
    await through(await channel.open(PATH))


async def test_with_grpcs_server(grpcs_server: str) -> None:
    channel = Channel(grpcs_server, reader)
    try:
        await through(await channel.open(PATH))
    finally:
        channel.close()


async def test_with_grpcs_client(server: str) -> None:
    options = [("grpc.max_receive_message_length", LIMIT), ("grpc.max_send_message_length", LIMIT)]
    async with grpc.aio.insecure_channel(server, options=options) as channel:
        call = channel.stream_stream(PATH)()
        for message in MESSAGES:
            await call.write(message)
            assert await call.read() == message
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_many_streams_at_once_with_messages_of_all_sizes(channel: Channel) -> None:
    """More than the peer takes at once: the others wait for their turn."""

    async def one() -> None:
        stream = await channel.open(PATH)
        for message in MESSAGES[:4]:
            await stream.send(message)
        assert [await stream.receive_whole() for _ in range(4)] == MESSAGES[:4]
        stream.cancel()

    async with asyncio.timeout(30):
        await asyncio.gather(*(one() for _ in range(40)))
    assert channel.streams == 0


async def test_a_long_message_that_nobody_reads_is_skipped(channel: Channel) -> None:
    stream = await channel.open(PATH)
    await stream.send(MESSAGES[3])
    await stream.send(b"next")
    assert isinstance(await stream.receive(), Incoming)
    assert await stream.receive() == b"next"


async def test_a_reading_that_is_broken_off_leaves_the_stream_in_order(channel: Channel) -> None:
    stream = await channel.open(PATH)
    await stream.send(MESSAGES[4])
    await stream.send(b"next")
    message = await stream.receive()
    assert isinstance(message, Incoming)

    def forbid() -> None:
        raise PermissionError

    from cluster.kv.transport.streams.views import Views

    with pytest.raises(PermissionError):
        await message.read_into(Views([memoryview(bytearray(message.left))]), forbid)
    assert await stream.receive() == b"next"


async def test_one_that_does_not_read_does_not_hold_up_other_connections(
    server: str, channel: Channel
) -> None:
    lazy = Channel(server, reader)
    stuck = await lazy.open(PATH)
    writing = asyncio.create_task(stuck.send(MESSAGES[4]))
    async with asyncio.timeout(30):
        await through(await channel.open(PATH))
    writing.cancel()
    lazy.close()


async def test_what_the_other_end_says_is_heard(channel: Channel) -> None:
    with pytest.raises(Broken, match="12: no such method"):
        await (await channel.open("/pdserve.v1.Test/Other")).receive()
    stream = await channel.open(PATH)
    await stream.send(b"fail")
    with pytest.raises(Broken, match="13: the method failed"):
        await stream.receive()
    await through(await channel.open(PATH))


async def test_a_cancelled_stream_ends_on_both_sides() -> None:
    ended = asyncio.Event()

    async def wait(stream: Stream) -> None:
        with pytest.raises(Broken, match="reset"):
            await stream.receive()
        ended.set()

    server = Server({PATH: wait}, reader, max_streams=8, handshake_seconds=5)
    channel = Channel(f"127.0.0.1:{server.bind('127.0.0.1', 0)}", reader)
    server.start()
    try:
        stream = await channel.open(PATH)
        await asyncio.sleep(0.05)
        stream.cancel()
        async with asyncio.timeout(30):
            await ended.wait()
        with pytest.raises(Broken):
            await stream.send(b"more")
    finally:
        channel.close()
        await server.stop()


async def test_a_connection_is_made_anew_when_it_broke(server: str, channel: Channel) -> None:
    stream = await channel.open(PATH)
    assert channel._connection is not None
    channel._connection.close("the test says so")
    with pytest.raises(Broken, match="the test says so"):
        await stream.receive()
    await through(await channel.open(PATH))


async def test_nobody_there() -> None:
    with pytest.raises(Broken, match=r"127\.0\.0\.1:1"):
        await Channel("127.0.0.1:1", reader).open(PATH)


async def test_a_server_that_stops_ends_what_runs(server: str, channel: Channel) -> None:
    other = Server({PATH: echo}, reader, max_streams=8, handshake_seconds=5)
    mine = Channel(f"127.0.0.1:{other.bind('127.0.0.1', 0)}", reader)
    other.start()
    stream = await mine.open(PATH)
    await through(stream)
    await other.stop()
    with pytest.raises(Broken):
        await stream.receive()
    mine.close()
