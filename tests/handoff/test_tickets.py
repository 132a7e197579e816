"""Promise I2, tickets: what is not signed, not for this rank, not now or not for the first time
costs nothing and lands nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import fields

import pytest
import torch

from cluster.kv.transport.frames import Ack, Commit, Grant, Open, Refused
from cluster.ticket import Ticket, TicketSigner
from tests.handoff.agents import LAYERS, TOKENS, Decode, Prefill, make_ticket, sign
from tests.handoff.raw import RawPeer, contents, landed, whole_prompt


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
        ({"prefill_geometry": "1x4x4xplain"}, "4 KV heads on prefill, 2 on decode"),
        ({"prefill_geometry": "3x2x4xplain"}, "geometry is impossible"),
        ({"prefill_geometry": "many"}, "geometry is malformed"),
        ({"prefill_geometry": "1x2x8xopaque-own"}, "cannot become blocks of 4"),
        ({"expires_at": time.time() - 1}, "has expired"),
        ({"issued_at": time.time() + 3600}, "from the future"),
    ],
)
async def test_a_ticket_for_something_else_is_refused(
    decode: Decode, peer: RawPeer, changes: dict[str, object], reason: str
) -> None:
    replies = await peer.push(Open(sign(make_ticket(TOKENS), **changes), 0))
    assert isinstance(replies[-1], Refused) and reason in replies[-1].reason
    assert decode.pinned() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "another request"},
        {"tenant_salt": "another tenant"},
        {"model": "another model"},
        {"prompt_digest": "of another prompt"},
        {"prefill_worker": "another worker"},
        {"prefill_incarnation": "another life"},
        {"num_tokens": 2 * TOKENS - 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
async def test_only_the_ticket_that_the_request_came_with_will_do(
    decode: Decode, peer: RawPeer, changes: dict[str, object]
) -> None:
    """Both are signed by the cluster and name the handoff; the engine was given one of them."""
    ticket = make_ticket(2 * TOKENS)
    decode.reserve(ticket, sign(ticket), (5, 6))
    before = contents(decode, (5, 6))
    replies = await peer.push(Open(sign(ticket, **changes), 0))
    assert replies == [Refused("the push shows another ticket than the request")]
    assert torch.equal(contents(decode, (5, 6)), before)
    decode.release(ticket)
    await decode.result(ticket.handoff_id)
    assert decode.pinned() == 0


async def test_a_ticket_of_another_cluster_is_refused(decode: Decode, peer: RawPeer) -> None:
    wire = TicketSigner(b"another cluster's secret").sign(make_ticket(TOKENS))
    assert await peer.push(Open(wire, 0)) == [Refused("ticket is not signed by this cluster")]
    assert decode.pinned() == 0


@pytest.mark.parametrize("wire", [b"", b".", b"{}", b"\xff" * 100, b"x" * 4000, b"x" * 4097])
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
    assert landed(prefill, decode, (1, 2), (5, 6))
    assert await peer.push(right[0]) == [Refused("the ticket has been used")]
    assert (await decode.result(ticket.handoff_id)).ok
    assert decode.pinned() == 0


async def test_a_replay_beside_the_push_does_not_disturb_it(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    first, *others = whole_prompt(prefill, ticket, (1, 2))
    push = peer.begin()
    await push.send(Open(wire, 0))
    await push.granted()
    await push.send(first)
    assert await peer.push(Open(wire, 0)) == [Refused("the ticket has been used")]
    await push.send(*others, Commit(LAYERS, 7, 2 * TOKENS))
    assert await push.replies() == [Ack()]
    assert landed(prefill, decode, (1, 2), (5, 6))
    assert (await decode.result(ticket.handoff_id)).ok
    assert decode.pinned() == 0


async def test_the_ticket_of_a_request_that_has_ended_is_refused(
    decode: Decode, peer: RawPeer
) -> None:
    """Also when the end came before anything was reserved or pushed."""
    ticket = make_ticket(2 * TOKENS)
    decode.release(ticket)
    assert decode.pinned() == 0
    assert await peer.push(Open(sign(ticket), 0)) == [Refused("the ticket has been used")]


async def test_a_ticket_runs_out_while_decode_has_no_room(decode: Decode, peer: RawPeer) -> None:
    ticket = make_ticket(2 * TOKENS, seconds=1.0)
    async with asyncio.timeout(30):
        replies = await peer.push(Open(sign(ticket), 0))
    assert replies == [Refused("decode had no room within the ticket's life")]
    assert decode.pinned() == 0


async def test_another_rank_is_refused(decode: Decode, peer: RawPeer) -> None:
    replies = await peer.push(Open(sign(make_ticket(TOKENS)), 1))
    assert replies == [Refused("rank 1 of prefill has nothing for rank 0")]
    assert decode.pinned() == 0
