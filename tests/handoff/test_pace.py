"""Prefill and decode out of step: transfers faster than decode admits, grants that come late or
piecemeal, prompts that decode finds in its prefix cache meanwhile."""

from __future__ import annotations

import asyncio

import torch

from cluster.kv.transport.frames import Ack, Commit, Grant, Open
from tests.handoff.agents import BLOCKS, LAYERS, TOKENS, Decode, Prefill, make_ticket, sign
from tests.handoff.raw import RawPeer, contents, frame_of, landed


async def all_settled(prefill: Prefill, decode: Decode, count: int) -> None:
    await prefill.until(lambda: len(prefill.finished.sending) == count)
    await decode.until(lambda: len(decode.finished.recving) == count)
    assert not decode.finished.failed
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_the_push_may_come_before_the_reservation(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(num_tokens=TOKENS)
    wire = sign(ticket)
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    prefill.release(ticket, token=42)
    await prefill.until(lambda: prefill.pinned() > 0)
    decode.reserve(ticket, wire, (4,))
    assert (await decode.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (1,), (4,))
    await all_settled(prefill, decode, 1)


async def test_a_transfer_faster_than_the_scheduler_admits(
    prefill: Prefill, decode: Decode
) -> None:
    """Fourteen whole prompts are ready before decode takes the first; it has room for two at a
    time, and takes the last come first."""
    sources = range(1, BLOCKS - 1)
    tickets = {block: make_ticket(TOKENS) for block in sources}
    for block, ticket in tickets.items():
        prefill.offer(ticket, sign(ticket), decode.agent.address, (block,))
        prefill.release(ticket, token=42)
    await prefill.until(lambda: len(prefill.agent.pins().entries) == len(tickets))
    await decode.until(lambda: len(decode.agent.receiver._arrivals) == len(tickets))
    assert decode.pinned() == 0  # what waits there holds nothing
    waiting = list(reversed(tickets.items()))
    while waiting:
        now, waiting = waiting[:2], waiting[2:]
        for target, (_, ticket) in enumerate(now):
            decode.reserve(ticket, sign(ticket), (target,))
        for target, (block, ticket) in enumerate(now):
            assert (await decode.result(ticket.handoff_id)).ok
            assert landed(prefill, decode, (block,), (target,))
    await all_settled(prefill, decode, len(tickets))


async def test_without_a_grant_nothing_crosses(prefill: Prefill, decode: Decode) -> None:
    """Computed, offered, done – and still on prefill alone until decode has room."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    prefill.offer(ticket, wire, decode.agent.address, (1, 2))
    prefill.release(ticket, token=42)
    await decode.until(lambda: ticket.handoff_id in decode.agent.receiver._arrivals)
    (push,) = prefill.agent.sender._handoffs[ticket.handoff_id].pushes
    assert push.sent.frames == 0 and not prefill.agent.mailbox.take_granted()
    decode.reserve(ticket, wire, (5, 6))
    assert (await prefill.result(ticket.handoff_id)).ok
    assert prefill.agent.mailbox.take_granted() == [ticket.handoff_id]
    assert landed(prefill, decode, (1, 2), (5, 6))
    await all_settled(prefill, decode, 1)


async def test_the_grant_is_what_decode_lacks(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    """A prompt found in decode's prefix cache between placement and arrival: prefill learns of it
    with the grant, and sends the rest alone."""
    ticket = make_ticket(3 * TOKENS)
    wire = sign(ticket)
    push = peer.begin()
    await push.send(Open(wire, 0))  # placed as if nothing were there
    await decode.until(lambda: ticket.handoff_id in decode.agent.receiver._arrivals)
    before = contents(decode, (5, 6))
    decode.reserve(ticket, wire, (5, 6, 7), held=2)
    assert await push.granted() == Grant(2 * TOKENS, LAYERS * decode.cache.block_bytes)
    frame = frame_of(prefill, ticket, 0, 0, (3,), first_block=2, num_layers=LAYERS)
    await push.send(frame, Commit(1, 7, 3 * TOKENS))
    assert await push.end() == [Ack()]
    result = await decode.result(ticket.handoff_id)
    assert (result.blocks, result.held_tokens) == (1, 2 * TOKENS)
    assert torch.equal(contents(decode, (5, 6)), before)
    assert landed(prefill, decode, (3,), (7,))
    assert decode.pinned() == 0


async def test_chunks_that_decode_holds_are_skipped(prefill: Prefill, decode: Decode) -> None:
    """Computed chunk by chunk ahead of the grant; the hit ends within the second chunk."""
    ticket = make_ticket(5 * TOKENS)
    wire = sign(ticket)
    prefill.offer(ticket, wire, decode.agent.address, (1, 2))
    prefill.compute(ticket, (3, 4), first=2)
    await decode.until(lambda: ticket.handoff_id in decode.agent.receiver._arrivals)
    before = contents(decode, (8, 9, 10))
    decode.reserve(ticket, wire, (8, 9, 10, 11, 12), held=3)
    await decode.until(lambda: decode.frames(ticket) > 0)
    prefill.compute(ticket, (5,), first=4)
    prefill.release(ticket, token=42)
    result = await decode.result(ticket.handoff_id)
    assert result.bytes == 2 * LAYERS * decode.cache.block_bytes
    assert torch.equal(contents(decode, (8, 9, 10)), before)
    assert landed(prefill, decode, (4, 5), (11, 12))
    await all_settled(prefill, decode, 1)


async def test_frames_for_held_blocks_are_refused(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    """They may be shared with other requests by now."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6), held=1)
    before = contents(decode, (5, 6))
    push = peer.begin()
    await push.send(Open(wire, 0))
    await push.granted()
    await push.send(frame_of(prefill, ticket, 0, 0, (1, 2)))
    (refusal,) = await push.end()
    assert "layer 0 block 0 came where 1 was due" in str(refusal)
    assert torch.equal(contents(decode, (5, 6)), before)
    assert (await decode.result(ticket.handoff_id)).error
    assert decode.pinned() == 0


async def test_sixty_handoffs_at_once(prefill: Prefill, decode: Decode) -> None:
    """All of them at work, chunk by chunk, each in its own order on either side."""

    async def handoff(turn: int) -> None:
        ticket = make_ticket(2 * TOKENS)
        wire = sign(ticket)
        # Those of one turn in seven share blocks: they bring the same bytes to the same places.
        blocks = (turn % 7 * 2 + 1, turn % 7 * 2 + 2)
        await asyncio.sleep(turn % 5 * 0.003)
        prefill.offer(ticket, wire, decode.agent.address, blocks[:1])
        await asyncio.sleep(turn % 3 * 0.003)
        decode.reserve(ticket, wire, blocks)
        prefill.compute(ticket, blocks[1:], first=1)
        prefill.release(ticket, token=42)
        assert (await decode.result(ticket.handoff_id)).ok
        assert landed(prefill, decode, blocks, blocks)

    async with asyncio.TaskGroup() as group:
        for turn in range(60):
            group.create_task(handoff(turn))
    await all_settled(prefill, decode, 60)
