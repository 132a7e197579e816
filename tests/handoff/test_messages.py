"""Promise I2, messages: truncated, repeated, reordered, damaged and oversized frames, and frames
that are none, refuse the handoff as a whole. Frames may span several layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cluster.kv.assembly import BlockRun
from cluster.kv.transport.checksums import host_checksum, seed_of
from cluster.kv.transport.frames import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    Abort,
    Ack,
    Blocks,
    Commit,
    Frame,
    Grant,
    Open,
    blocks_header,
    encode_frame,
)
from cluster.ticket import Ticket
from tests.handoff.agents import LAYERS, TOKENS, WHERE, Decode, Prefill, make_ticket, sign
from tests.handoff.raw import RawPeer, contents, frame_of, landed, refused, whole_prompt

COMMIT = Commit(LAYERS, 7, 2 * TOKENS)


def renumbered(blocks: Blocks, ticket: Ticket, **changes: int) -> Blocks:
    """The same bytes under another header, its checksum made right again."""
    digest = host_checksum(blocks.payload, seed_of(ticket.handoff_id))
    return Blocks(replace(blocks.run, **changes), blocks.payload, digest)


def unsummed(blocks: Blocks) -> bytes:
    """A frame whose last bytes of payload stand where its sum should."""
    payload = bytes(blocks.payload.numpy())
    return blocks_header(blocks.run, len(payload) - CHECKSUM_BYTES) + payload


Frames = Callable[[Prefill, Ticket], list[Frame | bytes]]


def by_layer(change: Callable[[Blocks, Blocks, Blocks, Ticket], list[Frame | bytes]]) -> Frames:
    """Makes a case of the three right frames, one a layer."""
    return lambda prefill, ticket: change(*whole_prompt(prefill, ticket, (1, 2)), ticket)  # type: ignore[arg-type]


CASES: dict[str, tuple[str, Frames]] = {
    "reordered": ("frame 1 came where 0", by_layer(lambda a, b, c, t: [b, a, c])),
    "repeated": ("frame 0 came where 1", by_layer(lambda a, b, c, t: [a, a, b, c])),
    "repeated under the next number": (
        "layer 0 block 0 came where 2",
        by_layer(lambda a, b, c, t: [a, renumbered(a, t, sequence=1)]),
    ),
    "a gap": ("frame 2 came where 1", by_layer(lambda a, b, c, t: [a, c])),
    "a missing layer": (
        "committed before every block",
        by_layer(lambda a, b, c, t: [a, b, Commit(2, 7, 2 * TOKENS)]),
    ),
    "a missing block": (
        "committed before every block",
        lambda p, t: [
            frame_of(p, t, 0, 0, (1, 2)),
            frame_of(p, t, 1, 1, (1,)),
            frame_of(p, t, 2, 2, (1, 2)),
            COMMIT,
        ],
    ),
    "one frame too few counted": (
        "committed before every block",
        by_layer(lambda a, b, c, t: [a, b, c, Commit(2, 7, 2 * TOKENS)]),
    ),
    "a shorter prompt": (
        "committed 7 of 8 tokens",
        by_layer(lambda a, b, c, t: [a, b, c, Commit(3, 7, 2 * TOKENS - 1)]),
    ),
    "no such token": (
        "not in the vocabulary",
        by_layer(lambda a, b, c, t: [a, b, c, Commit(3, 100, 2 * TOKENS)]),
    ),
    "no such layer": (
        "layers 3+1 of 3",
        by_layer(lambda a, b, c, t: [renumbered(a, t, layer=LAYERS)]),
    ),
    "a layer far away": (
        "layers 4294967295+1 of 3",
        by_layer(lambda a, b, c, t: [renumbered(a, t, layer=(1 << 32) - 1)]),
    ),
    "past the end": (
        "layer 0 block 1 came where 0",
        by_layer(lambda a, b, c, t: [renumbered(a, t, first_block=1)]),
    ),
    "more than the prompt": (
        "blocks 0+3 of 2",
        lambda p, t: [frame_of(p, t, 0, 0, (1, 2, 3))],
    ),
    "no blocks": (
        "blocks 0+0 of 2",
        lambda p, t: [Blocks(BlockRun(0, 0, 1, 0, 0), torch.empty(0, dtype=torch.uint8))],
    ),
    "a short payload": (
        "bytes for 2 blocks",
        by_layer(lambda a, b, c, t: [Blocks(a.run, a.payload[:-4], a.checksum)]),
    ),
    "a long payload": (
        "bytes for 2 blocks",
        by_layer(
            lambda a, b, c, t: [Blocks(a.run, torch.cat([a.payload, a.payload[:4]]), a.checksum)]
        ),
    ),
    "truncated on the wire": (
        "malformed, truncated",
        by_layer(lambda a, b, c, t: [encode_frame(a)[:-1]]),
    ),
    "a truncated header": (
        "is truncated",
        by_layer(lambda a, b, c, t: [encode_frame(a)[: HEADER_BYTES - 1]]),
    ),
    "a tail on the wire": (
        "has a tail",
        by_layer(lambda a, b, c, t: [encode_frame(a) + b"\0"]),
    ),
    # the sum behind the payload
    "no sum": (
        "malformed, truncated",
        by_layer(lambda a, b, c, t: [encode_frame(a)[:-CHECKSUM_BYTES]]),
    ),
    "a payload that ends where its sum should be": (
        "frame",
        by_layer(lambda a, b, c, t: [unsummed(a)]),
    ),
    "another field for a sum": (
        "ends without its checksum",
        by_layer(lambda a, b, c, t: [encode_frame(a)[:-CHECKSUM_BYTES] + b"\x89\x01" + bytes(8)]),
    ),
    "a sum twice": (
        "has a tail",
        by_layer(lambda a, b, c, t: [encode_frame(a) + encode_frame(a)[-CHECKSUM_BYTES:]]),
    ),
    "another frame's sum": (
        "frame 0: checksum differs",
        by_layer(lambda a, b, c, t: [Blocks(a.run, a.payload, b.checksum)]),
    ),
    "a sum of nothing": (
        "frame 0: checksum differs",
        by_layer(lambda a, b, c, t: [Blocks(a.run, a.payload, 0)]),
    ),
    "a second ticket": (
        "a second ticket",
        by_layer(lambda a, b, c, t: [a, Open(sign(t), 0)]),
    ),
    "given up": (
        "prefill gave up: lost",
        by_layer(lambda a, b, c, t: [a, Abort("lost")]),
    ),
    "nothing at all": ("prefill stopped half-way", by_layer(lambda a, b, c, t: [])),
    "stopped half-way": ("prefill stopped half-way", by_layer(lambda a, b, c, t: [a, b])),
    "stopped before the commit": (
        "prefill stopped half-way",
        by_layer(lambda a, b, c, t: [a, b, c]),
    ),
    # frames of several layers
    "more layers than there are": (
        "layers 2+2 of 3",
        lambda p, t: [
            frame_of(p, t, 0, 0, (1, 2), num_layers=2),
            renumbered(frame_of(p, t, 1, 1, (1, 2), num_layers=2), t, layer=2),
        ],
    ),
    "no layers": ("layers 0+0 of 3", by_layer(lambda a, b, c, t: [renumbered(a, t, num_layers=0)])),
    "layers without end": (
        "layers 0+4294967295 of 3",
        by_layer(lambda a, b, c, t: [renumbered(a, t, num_layers=(1 << 32) - 1)]),
    ),
    "layers that have come": (
        "layer 1 block 0 came where 2",
        lambda p, t: [
            frame_of(p, t, 0, 0, (1, 2), num_layers=2),
            frame_of(p, t, 1, 1, (1, 2), num_layers=2),
        ],
    ),
    "layers that are not equally far": (
        "layer 1 block 1 came where 0",
        lambda p, t: [
            frame_of(p, t, 0, 0, (1,)),
            frame_of(p, t, 1, 0, (2,), first_block=1, num_layers=2),
        ],
    ),
    "one layer's bytes for two": (
        "in 2 layers",
        by_layer(lambda a, b, c, t: [renumbered(a, t, num_layers=2)]),
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_what_is_not_due_is_refused(
    prefill: Prefill, decode: Decode, peer: RawPeer, name: str
) -> None:
    reason, frames = CASES[name]
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    found = await refused(decode, peer, ticket, wire, Open(wire, 0), *frames(prefill, ticket))
    assert reason in found


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 3, (1, 2), 0)],
        [(0, 2, (1, 2), 0), (2, 1, (1, 2), 0)],
        [(1, 2, (1,), 0), (0, 1, (1, 2), 0), (1, 1, (2,), 1), (2, 1, (2,), 1)],
        [(0, 3, (1,), 0), (0, 3, (2,), 1)],
    ],
    ids=["one frame", "two and one", "layers in any order", "chunk by chunk"],
)
async def test_however_the_prompt_is_cut_it_lands(
    prefill: Prefill,
    decode: Decode,
    peer: RawPeer,
    parts: list[tuple[int, int, tuple[int, ...], int]],
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    frames = [
        frame_of(prefill, ticket, i, layer, ids, first, layers)
        for i, (layer, layers, ids, first) in enumerate(parts)
    ]
    replies = await peer.push(Open(wire, 0), *frames, Commit(len(frames), 7, 2 * TOKENS))
    assert [type(reply) for reply in replies] == [Grant, Ack]
    assert landed(prefill, decode, (1, 2), (5, 6))
    assert (await decode.result(ticket.handoff_id)).ok
    assert decode.pinned() == 0


@pytest.mark.parametrize("where", [0, 100, -1])
@pytest.mark.parametrize("num_layers", [1, LAYERS])
async def test_damage_of_one_bit_is_noticed(
    prefill: Prefill, decode: Decode, peer: RawPeer, where: int, num_layers: int, times: int
) -> None:
    """What is read to its place lies there damaged, in blocks that the engine gets back as failed
    (`refused` sees to that) and reads no more; what is copied is never written."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    frame = frame_of(prefill, ticket, 0, 0, (1, 2), num_layers=num_layers)
    before = contents(decode, (5, 6))
    frame.payload[where] ^= 0x10
    assert (
        await refused(decode, peer, ticket, wire, Open(wire, 0), frame)
        == "frame 0: checksum differs"
    )
    in_place = times > 1 and (WHERE.device, WHERE.transport) == ("cpu", "grpc")
    assert torch.equal(contents(decode, (5, 6)), before) is not in_place


async def test_every_bit_around_a_payload_counts(prefill: Prefill, decode: Decode) -> None:
    """Whatever bit of its header or its sum flips, the frame is no frame, not the one that is due,
    or its checksum differs."""
    for bit in range(-CHECKSUM_BYTES * 8, HEADER_BYTES * 8, 7):
        ticket = make_ticket(2 * TOKENS)
        wire = sign(ticket)
        frame = bytearray(encode_frame(frame_of(prefill, ticket, 0, 0, (1, 2))))
        frame[bit // 8] ^= 1 << bit % 8
        peer = RawPeer(decode)
        await refused(decode, peer, ticket, wire, Open(wire, 0), bytes(frame))
        await peer.close()


async def test_a_frame_of_another_handoff_is_noticed(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    ticket, other = make_ticket(2 * TOKENS), make_ticket(2 * TOKENS)
    wire = sign(ticket)
    frames = whole_prompt(prefill, other, (1, 2))
    reason = await refused(decode, peer, ticket, wire, Open(wire, 0), *frames)
    assert reason == "frame 0: checksum differs"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\x00",
        b"\x12",
        b"\x12\xff\xff\xff\xff\xff\xff",
        b"\x12\x02\x08\x01\x7a\x7f",
        b"\xff" * 64,
        b"\x22\x02\xff\xfe",  # an Abort whose reason is no text
    ],
)
async def test_frames_that_are_none_are_refused(
    decode: Decode, peer: RawPeer, garbage: bytes
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    await refused(decode, peer, ticket, wire, Open(wire, 0), garbage)


async def test_a_push_must_begin_with_a_ticket(decode: Decode, peer: RawPeer) -> None:
    replies = await peer.push(Commit(0, 0, 0))
    assert [str(reply) for reply in replies] == [
        "Refused(reason='a push must begin with a ticket')"
    ]
    assert decode.pinned() == 0


async def test_the_acknowledgement_is_the_last_word(
    prefill: Prefill, decode: Decode, peer: RawPeer
) -> None:
    """What comes behind a commit lands nowhere."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    push = peer.begin()
    await push.send(Open(wire, 0))
    await push.granted()
    await push.send(*whole_prompt(prefill, ticket, (1, 2)), COMMIT)
    assert await push.reply() == Ack()
    await push.send(frame_of(prefill, ticket, LAYERS, 0, (3, 4)), COMMIT)
    assert (await decode.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (1, 2), (5, 6))
    assert decode.pinned() == 0
