"""Payloads that threads move between sockets and memory: whole, broken off, and left behind."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from h2.connection import H2Connection

from cluster.kv.transport.streams.client import Channel
from cluster.kv.transport.streams.protocol import PREFIX, request
from cluster.kv.transport.streams.reading import Broken, Incoming, Reader
from cluster.kv.transport.streams.server import Server
from cluster.kv.transport.streams.stream import Stream
from cluster.kv.transport.streams.views import Views

PATH, OTHER = "/pdserve.v1.Test/Take", "/pdserve.v1.Test/Echo"
PAYLOAD = os.urandom(20 << 20)
"""More than HTTP/2 frames hold, and than the kernel takes from who is not read from."""
END = b"the end"


class Seal:
    """Keeps what passes."""

    size = len(END)

    def __init__(self) -> None:
        self.seen = bytearray()
        self.began = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def add(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            self.seen += piece
        if self.seen:
            self._loop.call_soon_threadsafe(self.began.set)

    def end(self) -> bytes:
        return END


def sets(event: asyncio.Event) -> Callable[[Sequence[memoryview]], None]:
    """From any thread."""
    loop = asyncio.get_running_loop()
    return lambda _: loop.call_soon_threadsafe(event.set) and None


def reader(go_on: Callable[[], None]) -> Reader:
    return Reader(64 << 20, 8192, 48, go_on)


async def echo(stream: Stream) -> None:
    while (message := await stream.receive_whole()) is not None:
        await stream.send(message)


@asynccontextmanager
async def peers(take: Callable[[Stream], Awaitable[None]]) -> AsyncIterator[Channel]:
    server = Server({PATH: take, OTHER: echo}, reader, max_streams=8, handshake_seconds=5)
    channel = Channel(f"127.0.0.1:{server.bind('127.0.0.1', 0)}", reader)
    server.start()
    try:
        yield channel
    finally:
        channel.close()
        await server.stop()


async def goes_on(channel: Channel) -> None:
    """Others on the connection are served."""
    stream = await channel.open(OTHER)
    await stream.send(b"still there")
    assert await stream.receive_whole() == b"still there"
    stream.cancel()


def send(stream: Stream, memory: bytearray, seal: Seal) -> asyncio.Task[None]:
    pieces = [memoryview(memory)]
    return asyncio.create_task(stream.send_sealed(b"head", pieces, seal, lendable=True))


def porters() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name in ("kv-send", "kv-receive")}


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 – nothing tells of it
        await asyncio.sleep(0.01)


async def test_threads_move_payloads_and_the_loop_sees_every_byte() -> None:
    taken: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    async def take(stream: Stream) -> None:
        taken.set_result(await stream.receive_whole())

    async with peers(take) as channel, asyncio.timeout(30):
        seal = Seal()
        await send(await channel.open(PATH), bytearray(PAYLOAD), seal)
        assert await taken == b"head" + PAYLOAD + END
        assert seal.seen == PAYLOAD
        assert {thread.name for thread in porters()} == {"kv-send", "kv-receive"}


async def test_a_payload_that_is_called_off_is_read_no_more() -> None:
    """Its frame ends in zeros, and the connection goes on."""
    may_read = asyncio.Event()
    broke = asyncio.Event()

    async def take(stream: Stream) -> None:
        await may_read.wait()
        with pytest.raises(Broken):
            while await stream.receive_whole() is not None:
                pass
        broke.set()

    async with peers(take) as channel, asyncio.timeout(30):
        stream = await channel.open(PATH)
        memory, seal = bytearray(PAYLOAD), Seal()
        sending = send(stream, memory, seal)
        await seal.began.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert stream.over
        seen = bytes(seal.seen)
        memory[:] = bytes(len(memory))
        may_read.set()
        await broke.wait()
        await goes_on(channel)
        assert seal.seen == seen == PAYLOAD[: len(seen)]
        assert len(seen) < len(PAYLOAD)


async def test_one_that_is_called_off_before_it_began_to_leave_is_still_a_message() -> None:
    """Zeros alone would be millions of empty ones."""
    taken: list[int] = []
    broke = asyncio.Event()

    async def take(stream: Stream) -> None:
        with pytest.raises(Broken):
            while (message := await stream.receive_whole()) is not None:
                taken.append(len(message))
        broke.set()

    async with peers(take) as channel, asyncio.timeout(30):
        stream = await channel.open(PATH)
        sending = send(stream, bytearray(PAYLOAD), Seal())
        await asyncio.sleep(0)  # a thread has been told to begin, and has hardly had the time
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await broke.wait()
        assert taken == []
        await goes_on(channel)


async def test_a_reading_that_is_broken_off_leaves_the_memory_alone() -> None:
    async def take(stream: Stream) -> None:
        await stream.send(PAYLOAD)
        await stream.send(b"next")

    async with peers(take) as channel, asyncio.timeout(30):
        stream = await channel.open(PATH)
        message = await stream.receive()
        assert isinstance(message, Incoming)
        memory, began = bytearray(message.left), asyncio.Event()
        views = Views([memoryview(memory)])
        reading = asyncio.create_task(message.read_into(views, None, sets(began)))
        await began.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        memory[:] = bytes(len(memory))
        assert await stream.receive() == b"next"
        assert not any(memory)
        await goes_on(channel)


@pytest.mark.parametrize("reads", [True, False])
async def test_a_connection_that_breaks_is_let_go_by_its_threads(reads: bool) -> None:
    """Of a peer that leaves within a payload, on the side that waits for more of it and on the one
    that has more."""
    left: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    begun = asyncio.Event()

    async def take(stream: Stream) -> None:
        try:
            if reads:
                message = await stream.receive()
                assert isinstance(message, Incoming)
                memory = Views([memoryview(bytearray(message.left))])
                await message.read_into(memory, None, sets(begun))
            else:
                seal = Seal()
                sending = send(stream, bytearray(PAYLOAD), seal)
                await seal.began.wait()
                begun.set()
                await sending
        except Broken as broken:
            left.set_result(broken)

    async with peers(take) as channel, asyncio.timeout(30):
        stream = await channel.open(PATH)
        sending = None
        if reads:
            # Never all of it: the last bytes are waited for.
            half = bytearray(PAYLOAD[: 4 << 20])
            sending = asyncio.create_task(stream.send_sealed(b"", [memoryview(half)], Never()))
        await begun.wait()
        connection = channel._connection
        assert connection is not None
        if sending is not None:
            sending.cancel()
        channel.close()
        assert isinstance(await left, Broken)
        await until(lambda: connection._sock.fileno() == -1)


class Never(Seal):
    """Of a message whose end does not come."""

    size = 20 << 20


async def test_a_thread_that_has_nothing_to_do_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.kv.transport.streams.loan.IDLE_SECONDS", 0.05)
    before = porters()

    async def take(stream: Stream) -> None:
        for _ in range(2):
            assert await stream.receive_whole() == b"head" + PAYLOAD + END
        await stream.send(b"taken")

    async with peers(take) as channel, asyncio.timeout(30):
        stream = await channel.open(PATH)
        for _ in range(2):
            await send(stream, bytearray(PAYLOAD), Seal())
            await asyncio.sleep(0.2)
        assert await stream.receive_whole() == b"taken"
        await until(lambda: not porters() - before)


async def test_threads_let_go_of_what_they_have_moved() -> None:
    async def take(stream: Stream) -> None:
        await stream.receive_whole()

    def free() -> bool:
        """Nobody looks at the memory any more."""
        try:
            memory.append(0)
        except BufferError:
            return False
        return True

    async with peers(take) as channel, asyncio.timeout(30):
        memory, stream = bytearray(PAYLOAD), await channel.open(PATH)
        sending = send(stream, memory, Seal())
        await sending
        stream.cancel()
        del sending, stream
        await until(free)


class Refuses(Seal):
    def add(self, pieces: Sequence[memoryview]) -> None:
        if any(map(len, pieces)):
            raise ArithmeticError("no sum")


async def test_a_thread_that_fails_breaks_the_connection() -> None:
    async def take(stream: Stream) -> None:
        with pytest.raises(Broken):
            await stream.receive_whole()

    async with peers(take) as channel, asyncio.timeout(30):
        stream = await channel.open(PATH)
        with pytest.raises(Broken, match="not summed up: no sum"):
            await send(stream, bytearray(PAYLOAD), Refuses())


async def test_a_process_that_may_have_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    async def take(stream: Stream) -> None:
        with pytest.raises(Broken):
            await stream.receive_whole()

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with peers(take) as channel, asyncio.timeout(30):
        stream = await channel.open(PATH)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(Broken, match="can't start new thread"):
                await send(stream, bytearray(PAYLOAD), Seal())


async def test_a_peer_that_breaks_the_protocol_behind_a_payload_is_closed() -> None:
    """It says how long its call is, and sends more."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def take(stream: Stream) -> None:
        with pytest.raises(Broken):
            while await stream.receive_whole() is not None:
                pass
        ended.set_result(None)

    async with peers(take) as channel, asyncio.timeout(30):
        host, _, port = channel._address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        protocol = H2Connection()
        protocol.initiate_connection()
        writer.write(protocol.data_to_send())
        while protocol.max_outbound_frame_size < 2 << 20:
            protocol.receive_data(await reader.read(65536))
        headers = request(channel._address, PATH)
        protocol.send_headers(1, [*headers, ("content-length", "5")])
        protocol.send_data(1, PREFIX.pack(0, 2 << 20) + bytes(2 << 20), end_stream=True)
        writer.write(protocol.data_to_send())
        while await reader.read(65536):
            pass
        await ended
        writer.close()
