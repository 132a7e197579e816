"""Peers that stop, stall, drip, die, restart or come late: every wait ends with the lease at the
latest, nothing unverified is used, and what comes after works."""

from __future__ import annotations

import asyncio
import socket

import pytest
import torch

from cluster.kv.transport.frames import Ack, Commit, Grant, Open, Refused
from tests.handoff.agents import (
    LAYERS,
    TOKENS,
    Decode,
    Prefill,
    make_ticket,
    random_cache,
    sign,
    start_agent,
)
from tests.handoff.http2 import connect, data_frame, stream_headers
from tests.handoff.raw import RawPeer, contents, landed, whole_prompt

LATE = "the lease ran out before every block had arrived"
COMMIT = Commit(LAYERS, 7, 2 * TOKENS)


async def right_handoff(prefill: Prefill, decode: Decode) -> None:
    """The two still do what they are for."""
    ticket = make_ticket(2 * TOKENS)
    decode.reserve(ticket, sign(ticket), (12, 13))
    prefill.offer(ticket, sign(ticket), decode.agent.address, (3, 4))
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (3, 4), (12, 13))
    await prefill.until(lambda: f"p-{ticket.handoff_id}" in prefill.finished.sending)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


@pytest.mark.parametrize("frames_before", range(LAYERS + 1))
async def test_a_sender_that_stalls_half_way_costs_its_lease(
    prefill: Prefill, decode: Decode, peer: RawPeer, frames_before: int
) -> None:
    """Alive, connected, and silent: after any frame, also before the commit."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    push = peer.begin()
    await push.send(Open(wire, 0), *whole_prompt(prefill, ticket, (1, 2))[:frames_before])
    await push.granted()
    await decode.until(lambda: decode.frames(ticket) == frames_before)
    decode.run_out(ticket)
    async with asyncio.timeout(10):  # the port ends the stream, too
        assert await push.replies() == [Refused(LATE)]
    assert (await decode.result(ticket.handoff_id)).error == LATE
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    await right_handoff(prefill, decode)


async def test_a_sender_that_drips_costs_its_lease(prefill: Prefill, decode: Decode) -> None:
    """A byte at a time, in well-formed HTTP/2: the frame would be right in the end."""
    ticket = make_ticket(2 * TOKENS, seconds=0.6)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    before = contents(decode, (5, 6))
    loop = asyncio.get_running_loop()
    with connect(decode.agent.address) as drip:
        drip.sendall(stream_headers(1))
        drip.sendall(data_frame(1, Open(wire, 0)))
        bytes_of_a_frame = data_frame(1, whole_prompt(prefill, ticket, (1, 2))[0])
        sent = 0
        while ticket.handoff_id not in decode.results and sent < len(bytes_of_a_frame):
            await loop.run_in_executor(None, drip.sendall, bytes_of_a_frame[sent : sent + 1])
            sent += 1
            decode.step()
            await asyncio.sleep(0.01)
    assert 0 < sent < len(bytes_of_a_frame)
    assert (await decode.result(ticket.handoff_id)).error == LATE
    assert torch.equal(contents(decode, (5, 6)), before)
    await right_handoff(prefill, decode)


async def test_a_sender_that_drips_its_ticket_is_not_waited_for(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.kv.receiver.OPEN_TIMEOUT_SECONDS", 0.3)
    with connect(decode.agent.address) as drip:
        drip.sendall(stream_headers(1))
        drip.sendall(data_frame(1, Open(sign(make_ticket(TOKENS)), 0))[:-1])
        await asyncio.to_thread(ends_stream, drip, 1)
    await right_handoff(prefill, decode)


def ends_stream(port: socket.socket, stream: int) -> None:
    """Reads until the other side has ended the stream: its trailers, or a reset."""
    buffered = b""
    while True:
        while len(buffered) >= 9:
            size = int.from_bytes(buffered[:3], "big")
            kind, flags, number = buffered[3], buffered[4], int.from_bytes(buffered[5:9], "big")
            if number == stream and (kind == 3 or (kind == 1 and flags & 1)):
                return
            if len(buffered) < 9 + size:
                break
            buffered = buffered[9 + size :]
        more = port.recv(65536)
        assert more, "the connection was closed"
        buffered += more


async def test_the_late_writer_after_the_lease(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    """The blocks belong to another request by the time the first one's frames come."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    push = peer.begin()
    await push.send(Open(wire, 0))
    await push.granted()
    decode.run_out(ticket)
    assert (await decode.result(ticket.handoff_id)).error == LATE
    heir = make_ticket(2 * TOKENS)
    decode.agent.generations.renew([5, 6])
    decode.reserve(heir, sign(heir), (5, 6))
    prefill.offer(heir, sign(heir), decode.agent.address, (3, 4))
    prefill.release(heir, token=1)
    assert await push.reply() == Refused(LATE)
    await push.send(*whole_prompt(prefill, ticket, (1, 2)), COMMIT)
    assert (await decode.result(heir.handoff_id)).ok
    assert landed(prefill, decode, (3, 4), (5, 6))
    assert await peer.push(Open(wire, 0)) == [Refused("the ticket has been used")]
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


@pytest.mark.parametrize("frames_before", range(LAYERS + 1))
async def test_a_sender_that_vanishes_ends_the_handoff_at_once(
    prefill: Prefill, decode: Decode, frames_before: int
) -> None:
    """Its connection breaks long before its lease ends."""
    ticket = make_ticket(2 * TOKENS, seconds=60)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    peer = RawPeer(decode)
    push = peer.begin()
    await push.send(Open(wire, 0), *whole_prompt(prefill, ticket, (1, 2))[:frames_before])
    await push.granted()
    await decode.until(lambda: decode.frames(ticket) == frames_before)
    await peer.close()
    assert (await decode.result(ticket.handoff_id)).error
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    await right_handoff(prefill, decode)


async def test_decode_restarts_mid_transfer(prefill: Prefill, decode: Decode, times: int) -> None:
    """Its former life's ticket is nothing to the new one, which takes the retry."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    decode.agent.stop()
    cache = random_cache(3, times, "decode")
    reborn = Decode(start_agent("decode", cache, 4096 * times, incarnation="the next life"), cache)
    try:
        peer = RawPeer(reborn)
        refusal = await peer.push(Open(wire, 0))
        assert refusal == [Refused("the ticket is for another worker or another life of this one")]
        await peer.close()
        prefill.release(ticket, token=42)
        assert (await prefill.result(ticket.handoff_id)).error
        retry = make_ticket(2 * TOKENS, decode_incarnation="the next life")
        reborn.reserve(retry, sign(retry), (5, 6))
        prefill.offer(retry, sign(retry), reborn.agent.address, (1, 2))
        prefill.release(retry, token=42)
        assert (await reborn.result(retry.handoff_id)).ok
        assert landed(prefill, reborn, (1, 2), (5, 6))
        await prefill.until(lambda: len(prefill.finished.sending) == 2)
        assert (prefill.pinned(), reborn.pinned()) == (0, 0)
    finally:
        reborn.agent.stop()


async def test_prefill_restarts_mid_transfer(prefill: Prefill, decode: Decode, times: int) -> None:
    """Decode discards what came, and takes the whole prompt from the next life."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    prefill.agent.stop()
    assert (await decode.result(ticket.handoff_id)).error
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    cache = random_cache(4, times)
    agent = start_agent("prefill", cache, 4096 * times, incarnation="the next life")
    reborn = Prefill(agent, cache)
    try:
        retry = make_ticket(2 * TOKENS, prefill_incarnation="the next life")
        decode.reserve(retry, sign(retry), (5, 6))
        reborn.offer(retry, sign(retry), decode.agent.address, (1, 2))
        reborn.release(retry, token=42)
        assert (await decode.result(retry.handoff_id)).ok
        assert landed(reborn, decode, (1, 2), (5, 6))
        await reborn.until(lambda: bool(reborn.finished.sending))
        assert (reborn.pinned(), decode.pinned()) == (0, 0)
    finally:
        reborn.agent.stop()


async def test_two_transfers_interleaved_on_one_connection(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    """Frame by frame, and one of them is damaged half-way: the other lands."""
    one, two = make_ticket(2 * TOKENS), make_ticket(2 * TOKENS)
    decode.reserve(one, sign(one), (5, 6))
    decode.reserve(two, sign(two), (7, 8))
    pushes = [peer.begin(), peer.begin()]
    for push, ticket in zip(pushes, (one, two), strict=True):
        await push.send(Open(sign(ticket), 0))
        assert isinstance(await push.reply(), Grant)
    right = whole_prompt(prefill, one, (1, 2))
    wrong = whole_prompt(prefill, two, (3, 4))
    wrong[-1].payload[0] ^= 1
    for a, b in zip([*right, COMMIT], [*wrong, COMMIT], strict=True):
        await pushes[0].send(a)
        await pushes[1].send(b)
    assert await pushes[0].end() == [Ack()]
    assert await pushes[1].end() == [Refused("frame 2: checksum differs")]
    assert (await decode.result(one.handoff_id)).ok
    assert (await decode.result(two.handoff_id)).error == "frame 2: checksum differs"
    assert decode.finished.failed == {f"d-{two.handoff_id}"}
    assert landed(prefill, decode, (1, 2), (5, 6))
    assert decode.pinned() == 0
