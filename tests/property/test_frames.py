"""The wire: what is encoded comes back, in the one encoding that protobuf also reads; anything else
is refused, and in no other way."""

from __future__ import annotations

import contextlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.transport.frames import (
    CHECKSUM_BYTES,
    CONTROL_BYTES,
    HEADER_BYTES,
    Abort,
    Ack,
    Blocks,
    Commit,
    Frame,
    Grant,
    Open,
    Refused,
    Reply,
    decode_frame,
    decode_reply,
    encode_frame,
    encode_reply,
)
from cluster.kv.transport.hello import Payload, decode_link_reply, decode_payloads, encode_payloads
from pdserve.v1 import kv_transfer_pb2 as pb

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
RUNS = st.builds(BlockRun, U32, U32, U32, U32, U32)
PAYLOADS = st.binary(max_size=300)
FRAMES = st.one_of(
    st.builds(Open, st.binary(max_size=500), U32, U64),
    st.builds(Commit, U32, U32, U32, U64),
    st.builds(Abort, st.text(max_size=100)),
)
REPLIES = st.one_of(
    st.builds(Grant, U32, U64), st.just(Ack()), st.builds(Refused, st.text(max_size=100))
)


def blocks(run: BlockRun, payload: bytes, checksum: int) -> Blocks:
    memory = torch.frombuffer(bytearray(payload) or bytearray(1), dtype=torch.uint8)
    return Blocks(run, memory[: len(payload)], checksum)


@given(FRAMES)
def test_control_frames_come_back(frame: Frame) -> None:
    assert decode_frame(encode_frame(frame)) == frame


@given(REPLIES)
def test_replies_come_back(reply: Reply) -> None:
    assert decode_reply(encode_reply(reply)) == reply


@given(RUNS, PAYLOADS, U64)
def test_blocks_come_back_and_are_protobuf(run: BlockRun, payload: bytes, checksum: int) -> None:
    wire = encode_frame(blocks(run, payload, checksum))
    assert len(wire) == HEADER_BYTES + len(payload) + CHECKSUM_BYTES
    decoded = decode_frame(wire)
    assert isinstance(decoded, Blocks)
    found = decoded.run, bytes(decoded.payload.numpy()), decoded.checksum
    assert found == (run, payload, checksum)
    message = pb.PushFrame.FromString(wire)
    assert (message.payload, message.checksum) == (payload, checksum)
    assert message.blocks.sequence == run.sequence
    assert message.blocks.num_layers == run.num_layers


@given(RUNS, st.text(min_size=1, max_size=40), U64, U32)
def test_announcements_on_a_link_come_back(
    run: BlockRun, handoff_id: str, size: int, slot: int
) -> None:
    payloads = [Payload(handoff_id, run, size, summed, slot) for summed in (True, False)]
    assert decode_payloads(encode_payloads(payloads)) == payloads


@given(st.binary(max_size=200))
def test_noise_is_refused_and_nothing_worse(noise: bytes) -> None:
    for decode in (decode_frame, decode_reply, decode_payloads, decode_link_reply):
        with contextlib.suppress(HandoffRefused):
            decode(noise)


@given(RUNS, PAYLOADS, U64, st.data())
def test_a_damaged_frame_is_refused_or_reads_otherwise(
    run: BlockRun, payload: bytes, checksum: int, data: st.DataObject
) -> None:
    """Cut, lengthened or with a byte changed: never the same header and sum over other bytes."""
    wire = encode_frame(blocks(run, payload, checksum))
    at = data.draw(st.integers(0, len(wire) - 1))
    byte = data.draw(st.integers(1, 255))
    for damaged in (wire[:at], wire + wire[:byte], _changed(wire, at, byte)):
        try:
            found = decode_frame(damaged)
        except HandoffRefused:
            continue
        assert isinstance(found, Blocks)  # a changed field, payload or sum of the same length
        assert len(damaged) == len(wire)
        read = found.run, bytes(found.payload.numpy()), found.checksum
        assert read != (run, payload, checksum)


@given(st.sampled_from([b"\x0a", b"\x1a", b"\x22", b"\x0a\xff\xff\x03"]), st.integers(0, 100))
def test_only_blocks_may_be_long(start: bytes, beyond: int) -> None:
    wire = start + bytes(CONTROL_BYTES + 1 - len(start) + beyond)
    try:
        decode_frame(wire)
    except HandoffRefused as refusal:
        assert str(refusal) == "a frame is too long"
    else:
        raise AssertionError("a long control frame was read")


def _changed(wire: bytes, at: int, by: int) -> bytes:
    return wire[:at] + bytes((wire[at] ^ by,)) + wire[at + 1 :]
