"""Promise I2: no decode step reads an unverified block. Forged, expired, replayed, truncated and
damaged handoffs are refused as a whole, and both ledgers are back at 0."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import fields

import grpc.aio
import pytest
import torch

from cluster.kv.assembly import BlockRun
from cluster.kv.geometry import HeadRun
from cluster.kv.push import seed_of
from cluster.kv.transport.checksums import host_checksum
from cluster.kv.transport.frames import (
    Abort,
    Ack,
    Blocks,
    Commit,
    Frame,
    Grant,
    Open,
    Refused,
    Reply,
    decode_reply,
    encode_frame,
)
from cluster.ticket import Ticket, TicketSigner
from tests.handoff.agents import HEADS, LAYERS, TOKENS, Decode, Prefill, make_ticket, sign

METHOD = "/pdserve.v1.KvTransfer/Push"


class RawPeer:
    """Speaks to the transfer port directly, so that a test can send anything."""

    def __init__(self, decode: Decode) -> None:
        self._channel = grpc.aio.insecure_channel(decode.agent.address)

    async def push(self, *frames: Frame | bytes) -> list[Reply]:
        """Sends the frames and gathers every reply until the port closes the push."""
        call = self._channel.stream_stream(METHOD)()
        try:
            for frame in frames:
                await call.write(frame if isinstance(frame, bytes) else encode_frame(frame))
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the port has closed it already; its replies say why
        replies = []
        while (wire := await call.read()) is not grpc.aio.EOF:
            replies.append(decode_reply(wire))
        return replies

    async def close(self) -> None:
        await self._channel.close()


@pytest.fixture
async def peer(decode: Decode) -> AsyncIterator[RawPeer]:
    raw = RawPeer(decode)
    yield raw
    await raw.close()


def whole_prompt(prefill: Prefill, ticket: Ticket, block_ids: tuple[int, ...]) -> list[Blocks]:
    """One frame a layer, as a right sender makes them."""
    frames = []
    for layer in range(LAYERS):
        payload = torch.empty(len(block_ids) * prefill.cache.block_bytes, dtype=torch.uint8)
        prefill.cache.gather(layer, block_ids, HeadRun(0, HEADS), payload)
        digest = host_checksum(payload, seed_of(ticket.handoff_id))
        frames.append(Blocks(BlockRun(layer, layer, 1, 0, len(block_ids), digest), payload))
    return frames


def landed(
    prefill: Prefill, decode: Decode, sources: Iterable[int], targets: Iterable[int]
) -> bool:
    return all(
        torch.equal(
            prefill.cache._items[layer][list(sources)], decode.cache._items[layer][list(targets)]
        )
        for layer in range(LAYERS)
    )


async def refused(
    decode: Decode, peer: RawPeer, ticket: Ticket, wire: bytes, *frames: Frame | bytes
) -> str:
    """Pushes; asserts that nothing came of it; returns the reason."""
    decode.reserve(ticket, wire, (5, 6))
    replies = await peer.push(*frames)
    assert not any(isinstance(reply, Ack) for reply in replies)
    assert isinstance(replies[-1], Refused)
    result = await decode.result(ticket.handoff_id)
    assert result.error
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    assert decode.pinned() == 0
    return replies[-1].reason


async def test_a_right_handoff_lands_bit_for_bit(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(num_tokens=3 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (7, 3, 11))
    prefill.offer(ticket, wire, decode.agent.address, (1, 2), first=0)
    prefill.offer(ticket, wire, decode.agent.address, (9,), first=2)
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert (await prefill.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (1, 2, 9), (7, 3, 11))
    assert not decode.finished.failed
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_blocks_that_decode_holds_are_not_sent(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(num_tokens=3 * TOKENS)
    wire = sign(ticket)
    before = decode.cache._items[0][[7, 3]].clone()
    decode.reserve(ticket, wire, (7, 3, 11), held=2)
    prefill.offer(ticket, wire, decode.agent.address, (1, 2, 9))
    prefill.release(ticket, token=42)
    result = await decode.result(ticket.handoff_id)
    assert result.bytes == LAYERS * decode.cache.block_bytes
    assert torch.equal(decode.cache._items[0][[7, 3]], before)
    assert landed(prefill, decode, (9,), (11,))


async def test_the_push_may_come_before_the_reservation(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(num_tokens=TOKENS)
    wire = sign(ticket)
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    prefill.release(ticket, token=42)
    await prefill.until(lambda: prefill.pinned() > 0)
    decode.reserve(ticket, wire, (4,))
    assert (await decode.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (1,), (4,))


@pytest.mark.parametrize("field", [f.name for f in fields(Ticket)])
async def test_every_field_of_a_ticket_is_signed(decode: Decode, peer: RawPeer, field: str) -> None:
    ticket = make_ticket(num_tokens=2 * TOKENS)
    wire = sign(ticket)
    value = getattr(ticket, field)
    changed = sign(ticket, **{field: value + "x" if isinstance(value, str) else value + 1})
    forged = changed.rpartition(b".")[0] + b"." + wire.rpartition(b".")[2]
    replies = await peer.push(Open(forged, 0))
    assert replies == [Refused("ticket is not signed by this cluster")]
    assert decode.pinned() == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decode_worker": "other"}, "another worker"),
        ({"decode_incarnation": "a former life"}, "another life"),
        ({"layout": "other"}, "another KV layout"),
        ({"decode_geometry": "2x2x4xplain"}, "another KV geometry"),
        ({"expires_at": time.time() - 1}, "has expired"),
        ({"issued_at": time.time() + 3600}, "from the future"),
    ],
)
async def test_a_ticket_for_something_else_is_refused(
    decode: Decode, peer: RawPeer, changes: dict[str, object], reason: str
) -> None:
    replies = await peer.push(Open(sign(make_ticket(TOKENS), **changes), 0))
    assert isinstance(replies[-1], Refused) and reason in replies[-1].reason


async def test_a_ticket_of_another_cluster_is_refused(decode: Decode, peer: RawPeer) -> None:
    wire = TicketSigner(b"another cluster's secret").sign(make_ticket(TOKENS))
    assert await peer.push(Open(wire, 0)) == [Refused("ticket is not signed by this cluster")]


@pytest.mark.parametrize("wire", [b"", b".", b"{}", b"\xff" * 100, b"x" * 5000])
async def test_a_ticket_that_is_none_is_refused(decode: Decode, peer: RawPeer, wire: bytes) -> None:
    replies = await peer.push(Open(wire, 0))
    assert len(replies) == 1 and isinstance(replies[0], Refused)


async def test_a_ticket_is_good_for_one_push(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    right = [Open(wire, 0), *whole_prompt(prefill, ticket, (1, 2)), Commit(LAYERS, 7, 2 * TOKENS)]
    replies = await peer.push(*right)
    assert [type(reply) for reply in replies] == [Grant, Ack]
    assert await peer.push(right[0]) == [Refused("the ticket has been used")]


async def test_a_push_with_another_ticket_of_the_same_handoff_is_refused(
    decode: Decode, peer: RawPeer
) -> None:
    ticket = make_ticket(2 * TOKENS)
    decode.reserve(ticket, sign(ticket), (5, 6))
    replies = await peer.push(Open(sign(ticket, request_id="other"), 0))
    assert replies == [Refused("the push shows another ticket than the request")]


async def test_damage_of_one_bit_is_noticed(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    frames = whole_prompt(prefill, ticket, (1, 2))
    damaged = frames[1].payload.clone()
    damaged[17] ^= 0x10
    frames[1] = Blocks(frames[1].run, damaged)
    commit = Commit(LAYERS, 7, 2 * TOKENS)
    reason = await refused(decode, peer, ticket, wire, Open(wire, 0), *frames, commit)
    assert reason == "frame 1: checksum differs"


async def test_a_frame_of_another_handoff_is_noticed(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    ticket, other = make_ticket(2 * TOKENS), make_ticket(2 * TOKENS)
    wire = sign(ticket)
    frames = whole_prompt(prefill, other, (1, 2))
    reason = await refused(decode, peer, ticket, wire, Open(wire, 0), *frames)
    assert reason == "frame 0: checksum differs"


async def test_order_repetition_and_gaps(prefill: Prefill, decode: Decode, peer: RawPeer) -> None:
    def case(name: str, ticket: Ticket) -> list[Frame]:
        a, b, c = whole_prompt(prefill, ticket, (1, 2))
        run = a.run
        return {
            "reordered": [b, a, c],
            "repeated": [a, a, b, c],
            "repeated with the right number": [
                a, Blocks(BlockRun(1, 0, 1, 0, 2, run.checksum), a.payload)
            ],
            "missing layer": [a, b, Commit(2, 7, 2 * TOKENS)],
            "short count": [a, b, c, Commit(2, 7, 2 * TOKENS)],
            "wrong length": [a, b, c, Commit(3, 7, 2 * TOKENS - 1)],
            "no such layer": [Blocks(BlockRun(0, LAYERS, 1, 0, 2, run.checksum), a.payload)],
            "past the end": [Blocks(BlockRun(0, 0, 1, 1, 2, run.checksum), a.payload)],
            "no blocks": [Blocks(BlockRun(0, 0, 1, 0, 0, run.checksum), a.payload[:0])],
            "short payload": [Blocks(run, a.payload[:-4])],
            "second ticket": [Open(sign(ticket), 0)],
            "no such token": [a, b, c, Commit(3, 100, 2 * TOKENS)],
            "given up": [a, Abort("preempted")],
            "stopped half-way": [a, b],
        }[name]  # fmt: skip

    for name in [
        "reordered", "repeated", "repeated with the right number", "missing layer", "short count",
        "wrong length", "no such layer", "past the end", "no blocks", "short payload",
        "second ticket", "no such token", "given up", "stopped half-way",
    ]:  # fmt: skip
        ticket = make_ticket(2 * TOKENS)
        wire = sign(ticket)
        decode.finished.failed.clear()
        await refused(decode, peer, ticket, wire, Open(wire, 0), *case(name, ticket))


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        b"\x12",
        b"\x12\xff\xff\xff\xff\xff\xff",
        b"\x12\x02\x08\x01\x7a\x7f",
        b"\xff" * 64,
    ],
)
async def test_frames_that_are_none_are_refused(
    decode: Decode, peer: RawPeer, garbage: bytes
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    await refused(decode, peer, ticket, wire, Open(wire, 0), garbage)


async def test_another_rank_is_refused(decode: Decode, peer: RawPeer) -> None:
    replies = await peer.push(Open(sign(make_ticket(TOKENS)), 1))
    assert replies == [Refused("rank 1 of prefill has nothing for rank 0")]


async def test_a_push_must_begin_with_a_ticket(decode: Decode, peer: RawPeer) -> None:
    assert await peer.push(Commit(0, 0, 0)) == [Refused("a push must begin with a ticket")]


async def test_a_frame_over_the_limit_never_reaches_the_cache(
    decode: Decode, peer: RawPeer
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    with pytest.raises(grpc.aio.AioRpcError):
        await peer.push(Open(wire, 0), b"\x7a" + b"\x00" * (1 << 20))
    assert (await decode.result(ticket.handoff_id)).error
    assert decode.pinned() == 0


async def test_the_late_writer_after_the_lease_is_refused(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    ticket = make_ticket(2 * TOKENS, seconds=0.3)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    before = [layer[[5, 6]].clone() for layer in decode.cache._items]
    assert "lease" in (await decode.result(ticket.handoff_id)).error
    assert await peer.push(Open(wire, 0)) == [Refused("ticket has expired")]
    after = [layer[[5, 6]] for layer in decode.cache._items]
    assert all(map(torch.equal, before, after))


async def test_a_cancelled_request_is_never_written_again(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    decode.release(ticket)
    await decode.until(lambda: bool(decode.finished.recving))
    before = [layer[[5, 6]].clone() for layer in decode.cache._items]
    prefill.offer(ticket, wire, decode.agent.address, (2,), first=1)
    prefill.release(ticket, token=42)
    assert (await prefill.result(ticket.handoff_id)).error
    await prefill.until(lambda: bool(prefill.finished.sending))
    after = [layer[[5, 6]] for layer in decode.cache._items]
    assert all(map(torch.equal, before, after))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_two_handoffs_at_once_do_not_mix(prefill: Prefill, decode: Decode) -> None:
    one, two = make_ticket(2 * TOKENS), make_ticket(2 * TOKENS)
    for ticket, targets in ((one, (5, 6)), (two, (7, 8))):
        decode.reserve(ticket, sign(ticket), targets)
    for first in (0, 1):
        for ticket, sources in ((one, (1, 2)), (two, (3, 4))):
            prefill.offer(
                ticket, sign(ticket), decode.agent.address, (sources[first],), first=first
            )
            await asyncio.sleep(0)
    prefill.release(two, token=2)
    prefill.release(one, token=1)
    assert (await decode.result(one.handoff_id)).ok
    assert (await decode.result(two.handoff_id)).ok
    assert landed(prefill, decode, (1, 2, 3, 4), (5, 6, 7, 8))
