"""Who may open a link, and how it ends."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.transport.hello import (
    HELLO_SECONDS,
    Hello,
    Payload,
    decode_hello,
    decode_link_reply,
    encode_hello,
    encode_payloads,
)
from cluster.kv.transport.inbound_links import InboundLinks
from cluster.kv.transport.link import MAX_LINKS
from cluster.kv.transport.nccl_library import UNIQUE_ID_BYTES, LinkTooLarge, NcclError
from cluster.kv.transport.streams.reading import Broken
from cluster.ticket import CLOCK_TOLERANCE_SECONDS, TicketSigner
from tests.handoff.fake_links import HANDOFF, LINK, SIGNER, SIZE, SLOTS, Bench, FakeLink


def hello(**changes: Any) -> Hello:
    right = Hello(
        LINK, "prefill", "prefill-life", 0, "decode", "decode-life", 0,
        bytes(UNIQUE_ID_BYTES), time.time(), SLOTS, SIZE,
    )  # fmt: skip
    return replace(right, **changes)


def test_a_hello_comes_back() -> None:
    said = hello()
    assert decode_hello(encode_hello(said, SIGNER), SIGNER) == said


def test_every_byte_of_a_hello_is_signed() -> None:
    wire = encode_hello(hello(), SIGNER)
    for at in range(len(wire)):
        with pytest.raises(HandoffRefused):
            decode_hello(wire[:at] + bytes((wire[at] ^ 1,)) + wire[at + 1 :], SIGNER)
    for cut in range(0, len(wire), 5):
        with pytest.raises(HandoffRefused):
            decode_hello(wire[:cut], SIGNER)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"issued_at": time.time() - HELLO_SECONDS - 60}, "too old"),
        ({"issued_at": time.time() + CLOCK_TOLERANCE_SECONDS + 36_000}, "too old"),
        ({"unique_id": b"short"}, "malformed"),
        ({"link": 0}, "malformed"),
    ],
)
def test_a_hello_that_cannot_be(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(HandoffRefused, match=reason):
        decode_hello(encode_hello(hello(**changes), SIGNER), SIGNER)


def test_a_hello_of_another_cluster() -> None:
    wire = encode_hello(hello(), TicketSigner(b"another cluster's secret"))
    with pytest.raises(HandoffRefused, match="not signed by this cluster"):
        decode_hello(wire, SIGNER)


class Told:
    """A link's stream, of which all messages are there."""

    def __init__(self, *frames: bytes) -> None:
        self._frames = list(frames)
        self.replies: list[str] = []
        self.too_large = False

    async def receive_whole(self) -> bytes | None:
        return self._frames.pop(0) if self._frames else None

    async def send(self, wire: bytes) -> None:
        try:
            decode_link_reply(wire)
            self.replies.append("")
        except HandoffRefused as refusal:
            self.replies.append(str(refusal).removeprefix("the peer refused the link: "))
            self.too_large = isinstance(refusal, LinkTooLarge)

    def cancel(self) -> None: ...


async def serve(links: InboundLinks, *frames: bytes) -> list[str]:
    stream = Told(*frames)
    await links.serve(stream)  # type: ignore[arg-type]
    return stream.replies


@pytest.mark.parametrize(
    "changes", [{"decode_worker": "x"}, {"decode_incarnation": "x"}, {"decode_rank": 1}]
)
async def test_a_link_for_somebody_else_is_refused(changes: dict[str, Any]) -> None:
    replies = await serve(Bench().links, encode_hello(hello(**changes), SIGNER))
    assert replies == ["the link is for another worker, life or rank"]


async def test_a_hello_is_good_once_and_a_link_ends_with_what_is_no_announcement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench()
    made: list[FakeLink] = []

    class Made(FakeLink):
        def __init__(self, *args: object) -> None:
            super().__init__()
            made.append(self)

        async def up(self) -> None: ...

    monkeypatch.setattr("cluster.kv.transport.inbound_links.Link", Made)
    said = encode_hello(hello(link=8), SIGNER)
    payload = encode_payloads([Payload(HANDOFF, BlockRun(0, 0, 1, 0, 1), SIZE, False, 2)])
    assert await serve(bench.links, said, payload, said) == [""]
    assert (made[0].received, made[0].aborted) == (1, "the peer closed the link")
    assert await serve(bench.links, said) == ["the link's hello has been used"]
    assert len(made) == 1 and 8 not in bench.links._links
    assert made[0].unused == 1, "every slot is free, and the memory is given up"


@pytest.mark.parametrize(("size", "slot"), [(1 << 40, 0), (SIZE, SLOTS)])
async def test_a_payload_that_lies_in_no_slot_ends_the_link(
    monkeypatch: pytest.MonkeyPatch, size: int, slot: int
) -> None:
    bench = Bench()

    class Made(FakeLink):
        def __init__(self, *args: object) -> None:
            super().__init__()

        async def up(self) -> None: ...

    monkeypatch.setattr("cluster.kv.transport.inbound_links.Link", Made)
    payload = encode_payloads([Payload(HANDOFF, BlockRun(0, 0, 1, 0, 1), size, False, slot)])
    assert await serve(bench.links, encode_hello(hello(link=9), SIGNER), payload) == [""]
    assert 9 not in bench.links._links


class Opened(FakeLink):
    """A link that is up at once."""

    def __init__(self, *args: object) -> None:
        super().__init__()

    async def up(self) -> None: ...


async def test_links_that_cannot_be_made_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.links._links.clear()

    def no_memory(*args: object) -> FakeLink:
        raise NcclError("NCCL: unhandled cuda error")

    monkeypatch.setattr("cluster.kv.transport.inbound_links.Link", no_memory)
    for link in range(1, MAX_LINKS + 1):
        replies = await serve(bench.links, encode_hello(hello(link=link), SIGNER))
        assert replies == ["NCCL: unhandled cuda error"]
    monkeypatch.setattr("cluster.kv.transport.inbound_links.Link", Opened)
    assert await serve(bench.links, encode_hello(hello(link=99), SIGNER)) == [""]


async def test_a_link_of_a_name_that_is_in_use_is_refused() -> None:
    bench = Bench()
    replies = await serve(bench.links, encode_hello(hello(link=LINK), SIGNER))
    assert replies == ["the link's hello has been used"] and LINK in bench.links._links


class Waiting(Told):
    """A stream that says no more, takes no more than one reply, and hears of its end."""

    def __init__(self, *frames: bytes) -> None:
        super().__init__(*frames)
        self._ended = asyncio.Event()

    async def receive_whole(self) -> bytes | None:
        if wire := await super().receive_whole():
            return wire
        await self._ended.wait()
        raise Broken("the stream was closed")

    async def send(self, wire: bytes) -> None:
        if self.replies:
            await self._ended.wait()
        await super().send(wire)

    def cancel(self) -> None:
        self._ended.set()


@pytest.mark.parametrize("why", ["a watcher ends it", "its peer uses slots untold"])
async def test_a_link_that_is_down_is_gone_at_both_ends(
    monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Else a dead one counts among the links until its peer thinks of it again."""
    bench, made = Bench(), list[FakeLink]()

    def make(*args: object) -> FakeLink:
        made.append(Opened())
        return made[0]

    monkeypatch.setattr("cluster.kv.transport.inbound_links.Link", make)
    payload = encode_payloads([Payload(HANDOFF, BlockRun(0, 0, 1, 0, 1), SIZE, False, 2)])
    flood = [] if why == "a watcher ends it" else [payload] * (SLOTS + 2)
    stream = Waiting(encode_hello(hello(link=8), SIGNER), *flood)
    serving = asyncio.create_task(bench.links.serve(stream))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    if why == "a watcher ends it":
        assert not serving.done()
        made[0].abort("a transfer over the link stood still")
    async with asyncio.timeout(30):
        await serving
    assert 8 not in bench.links._links and made[0].unused == 1
    assert ("before it hears" in made[0].aborted) == bool(flood)


@pytest.mark.parametrize(("slots", "slot_bytes"), [(SLOTS, SIZE), (2, SIZE - 1)])
async def test_a_link_of_slots_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, slots: int, slot_bytes: int
) -> None:
    """Numbers without end would hold up the loop; a payload that is not aligned ends the engine."""
    monkeypatch.setattr("cluster.kv.transport.inbound_links.MAX_SLOTS", SLOTS - 1)
    said = encode_hello(hello(link=9, slots=slots, slot_bytes=slot_bytes), SIGNER)
    assert await serve(Bench().links, said) == [
        "the link asks for slots that no payload fits in well"
    ]


@pytest.mark.parametrize(("slots", "slot_bytes"), [(SLOTS + 1, SIZE), (1, 1 << 40), (0, SIZE)])
async def test_a_link_that_wants_too_much_memory_is_refused(slots: int, slot_bytes: int) -> None:
    said = encode_hello(hello(link=9, slots=slots, slot_bytes=slot_bytes), SIGNER)
    assert await serve(Bench().links, said) == [
        "the link asks for more than handoff.link_bytes, or for nothing"
    ]


async def test_links_are_not_without_number() -> None:
    bench = Bench()
    bench.links._links |= dict.fromkeys(range(100, 99 + MAX_LINKS), bench.link)  # type: ignore[arg-type]
    assert await serve(bench.links, encode_hello(hello(link=9), SIGNER)) == [
        f"there are {MAX_LINKS} links already"
    ]


@pytest.mark.parametrize(
    ("failure", "said", "too_large"),
    [
        (LinkTooLarge("a link needs 1024 MiB"), "a link needs 1024 MiB", True),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory", True),
        (NcclError("NCCL: remote process exited"), "NCCL: remote process exited", False),
    ],
)
async def test_the_peer_hears_whether_a_smaller_link_may_do(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, said: str, too_large: bool
) -> None:
    def fail(*args: object) -> FakeLink:
        raise failure

    monkeypatch.setattr("cluster.kv.transport.inbound_links.Link", fail)
    stream = Told(encode_hello(hello(link=9), SIGNER))
    await Bench().links.serve(stream)  # type: ignore[arg-type]
    assert len(stream.replies) == 1 and stream.replies[0].endswith(said)
    assert stream.too_large == too_large


async def test_a_link_of_more_than_this_end_allows_may_be_smaller() -> None:
    stream = Told(encode_hello(hello(link=9, slots=SLOTS + 1), SIGNER))
    await Bench().links.serve(stream)  # type: ignore[arg-type]
    assert stream.too_large
