"""The transfer port's own HTTP/2: however bytes are cut, the same messages come out, each byte in
its place, and memory is written only while it may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv.transport.streams.framing import PREFACE, Framing
from cluster.kv.transport.streams.protocol import DATA, END_STREAM, PADDED, PREFIX, data_header
from cluster.kv.transport.streams.reading import BadMessage, Incoming, Reader
from cluster.kv.transport.streams.sending import Frame
from cluster.kv.transport.streams.stream import Outgoing
from cluster.kv.transport.streams.views import Views

LIMIT, WHOLE, HEAD = 500, 40, 8


def cut(wire: bytes, sizes: Sequence[int]) -> list[bytes]:
    """Into parts of these sizes, again and again."""
    parts, at, i = [], 0, 0
    while at < len(wire):
        parts.append(wire[at : at + sizes[i % len(sizes)]])
        at += sizes[i % len(sizes)]
        i += 1
    return parts


@given(st.lists(st.integers(0, 30), max_size=12), st.lists(st.integers(1, 40), min_size=1))
def test_views_are_used_from_the_front(lengths: list[int], steps: list[int]) -> None:
    whole = bytes(i % 251 for i in range(sum(lengths)))
    pieces, at = [], 0
    for length in lengths:
        pieces.append(memoryview(whole)[at : at + length])
        at += length
    views, taken = Views(pieces), b""
    for step in steps:
        front = b"".join(views.front(step))
        assert whole[len(taken) :].startswith(front) and len(front) <= step
        part = b"".join(views.take(step))
        assert part == whole[len(taken) : len(taken) + step]
        taken += part
        assert views.left == len(whole) - len(taken)


@given(
    st.lists(st.binary(max_size=LIMIT), max_size=8),
    st.lists(st.integers(1, 700), min_size=1, max_size=5),
    st.booleans(),
)
def test_messages_come_out_as_they_went_in(
    messages: list[bytes], sizes: list[int], patient: bool
) -> None:
    """Bytes that nobody takes yet are given again, as the socket would."""

    async def run() -> list[bytes]:
        moved = asyncio.Event()
        reader = Reader(LIMIT, WHOLE, HEAD, moved.set)
        parts = cut(b"".join(PREFIX.pack(0, len(m)) + m for m in messages), sizes)

        async def feed() -> None:
            for part in parts:
                data = memoryview(part)
                while len(data):
                    moved.clear()
                    data = data[reader.feed(data) :]
                    if len(data):
                        await moved.wait()
                if patient:
                    await asyncio.sleep(0)
            reader.end()

        feeding = asyncio.create_task(feed())
        found = []
        while (message := await reader.next()) is not None:
            found.append(await whole(message))
        await feeding
        return found

    async def whole(message: bytes | Incoming) -> bytes:
        if not isinstance(message, Incoming):
            return message
        rest = bytearray(message.left)
        middle = len(rest) // 2
        pieces = [memoryview(rest)[:middle], memoryview(rest)[middle:]]
        await message.read_into(Views(pieces), lambda: None)
        return message.head + bytes(rest)

    assert asyncio.run(run()) == messages


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 12))
def test_nothing_is_written_once_it_may_not_be(sizes: list[int], turns: int) -> None:
    """And what comes behind is read all the same."""

    async def run() -> None:
        reader = Reader(LIMIT, WHOLE, HEAD, lambda: None)
        first, second = b"\x11" * 300, b"second"
        wire = b"".join(PREFIX.pack(0, len(m)) + m for m in (first, second))
        memory, left = bytearray(300 - HEAD), turns
        allowed = True

        def check() -> None:
            nonlocal allowed, left
            allowed = left > 0
            left -= 1
            if not allowed:
                raise PermissionError

        parts = [memoryview(part) for part in cut(wire, sizes)]
        fed = 0
        while reader.current is None:
            parts[fed] = parts[fed][reader.feed(parts[fed]) :]
            fed += not len(parts[fed])
        message = await reader.next()
        assert isinstance(message, Incoming)
        reading = asyncio.create_task(message.read_into(Views([memoryview(memory)]), check))
        await asyncio.sleep(0)
        seen = None
        for part in parts[fed:]:
            assert reader.feed(part) == len(part)
            if not allowed:
                seen = seen or bytes(memory)
                assert bytes(memory) == seen, "written after it was forbidden"
        if seen is None:
            await reading
            assert bytes(memory) == first[HEAD:]
        else:
            with pytest.raises(PermissionError):
                await reading
        assert await reader.next() == second

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prefix", "status"), [(PREFIX.pack(1, 3), 12), (PREFIX.pack(0, LIMIT + 1), 8)]
)
def test_messages_that_are_not_taken(prefix: bytes, status: int) -> None:
    reader = Reader(LIMIT, WHOLE, HEAD, lambda: None)
    with pytest.raises(BadMessage) as bad:
        reader.feed(memoryview(prefix + b"abc"))
    assert bad.value.status == status


class Witness:
    """A seal that remembers what it saw."""

    size = 4

    def __init__(self) -> None:
        self.seen = b""

    def add(self, pieces: Sequence[memoryview]) -> None:
        self.seen += b"".join(pieces)

    def end(self) -> bytes:
        return b"SEAL"


@given(
    st.lists(st.integers(1, 40), max_size=8),
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(0, 10)),
)
def test_a_seal_sees_just_what_has_left_and_stands_behind_it(
    lengths: list[int], rooms: list[int], sizes: list[int], called_off: int | None
) -> None:
    """However windows cut the message into frames and the socket the frames. Where it is called off
    the frame under way goes on with the message's start, then zeros, and nothing follows it."""
    payload = bytes(i % 250 + 1 for i in range(sum(lengths)))
    pieces = [memoryview(part) for part in map(bytearray, lengths)]
    Views(pieces).fill(memoryview(payload))

    async def run() -> None:
        seal, left, sent, turn = Witness(), b"", 0, 0
        stream: Any = None
        outgoing = Outgoing(stream, Views([memoryview(b"start"), *pieces]), None, seal, 5)
        while outgoing.left():
            frame = Frame(b"header", outgoing.part(rooms[turn % len(rooms)]), outgoing)
            whole = b""
            while frame.left:
                part = b"".join(frame.front())[: sizes[sent % len(sizes)]]
                whole += part
                frame.sent(len(part))
                if sent == called_off and outgoing.sealing:
                    due = len(whole) + frame.left
                    frame.blank()
                    assert len(whole) + frame.left == due
                    rest = b"".join(frame.front())[max(0, 6 - len(whole)) :]
                    start = b"start"[len(left + whole[6:]) :]
                    assert rest == (start + bytes(len(rest)))[: len(rest)]
                    assert (left + whole[6:])[5:] == seal.seen
                    return
                sent += 1
            left += whole[6:]
            turn += 1
        assert left == b"start" + payload + b"SEAL"
        assert seal.seen == payload

    asyncio.run(run())


class Seen:
    """Writes frames down; takes at most so much of a DATA frame at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.frames: list[object] = []
        self._data = b""

    def control(self, frame: bytes) -> None:
        self.frames.append(frame)

    def begin_data(self, stream_id: int) -> None:
        self._data = b""

    def data(self, data: memoryview) -> int:
        self._data += data[: self._most]
        return min(len(data), self._most)

    def end_data(self, stream_id: int, last: bool) -> None:
        self.frames.append((stream_id, self._data, last))


def frame(kind: int, stream_id: int, content: bytes, flags: int = 0) -> bytes:
    header = bytearray(data_header(stream_id, len(content), flags))
    header[3] = kind
    return bytes(header) + content


FRAMES = st.tuples(
    st.sampled_from([DATA, DATA, 1, 4, 6]),
    st.integers(0, 2**31 - 1),
    st.binary(max_size=200),
    st.sampled_from([0, END_STREAM]),
)


@given(st.lists(FRAMES, max_size=8), st.lists(st.integers(1, 300), min_size=1), st.integers(1, 99))
def test_frames_come_out_as_they_went_in(
    frames: list[tuple[int, int, bytes, int]], sizes: list[int], most: int
) -> None:
    seen = Seen(most)
    framing = Framing(seen, preface=True)
    for part in cut(PREFACE + b"".join(frame(*f) for f in frames), sizes):
        assert not len(framing.feed(memoryview(part)))
    assert seen.frames == [
        PREFACE,
        *(
            (stream_id, content, bool(flags))
            if kind == DATA
            else frame(kind, stream_id, content, flags)
            for kind, stream_id, content, flags in frames
        ),
    ]


REFUSED: dict[str, Callable[[], bytes]] = {
    "another preface": lambda: b"PRI * HTTP/1.1\r\n",
    "a padded frame": lambda: PREFACE + frame(DATA, 1, b"\x01ab", PADDED),
    "headers of 16 MiB": lambda: PREFACE + b"\xff\xff\xff\x01\x04\x00\x00\x00\x01",
}


@pytest.mark.parametrize("wire", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_http2(wire: Callable[[], bytes]) -> None:
    with pytest.raises(ValueError, match=r"preface|padded|too long"):
        Framing(Seen(1000), preface=True).feed(memoryview(wire()))
