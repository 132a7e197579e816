"""Who may open a link, and how it ends."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

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
from cluster.kv.transport.nccl_library import UNIQUE_ID_BYTES
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

    async def receive_whole(self) -> bytes | None:
        return self._frames.pop(0) if self._frames else None

    async def send(self, wire: bytes) -> None:
        self.replies.append(decode_link_reply(wire)[0])


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


@pytest.mark.parametrize(("slots", "slot_bytes"), [(SLOTS + 1, SIZE), (1, 1 << 40), (0, SIZE)])
async def test_a_link_that_wants_too_much_memory_is_refused(slots: int, slot_bytes: int) -> None:
    said = encode_hello(hello(slots=slots, slot_bytes=slot_bytes), SIGNER)
    assert await serve(Bench().links, said) == [
        "the link asks for more than handoff.link_bytes, or for nothing"
    ]


async def test_links_are_not_without_number() -> None:
    bench = Bench()
    bench.links._links |= dict.fromkeys(range(100, 99 + MAX_LINKS), bench.link)  # type: ignore[arg-type]
    assert await serve(bench.links, encode_hello(hello(link=9), SIGNER)) == [
        f"there are {MAX_LINKS} links already"
    ]
