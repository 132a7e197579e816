"""PushFrame and PushReply on the wire.

A frame of blocks is ordinary protobuf, but written and read in place: the payload is the message's
last field, so it is appended to the encoded header and looked at through a memoryview, and never
passes through protobuf's own copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from pdserve.v1 import kv_transfer_pb2 as pb

_BLOCKS_TAG = 0x12  # field 2, length-delimited
_PAYLOAD_TAG = b"\x7a"  # field 15, length-delimited
HEADER_BYTES = 64
"""More than a frame's header ever takes."""


@dataclass(frozen=True)
class Open:
    """First on a push: the signed ticket, and the sender's rank."""

    ticket: bytes
    rank: int


@dataclass(frozen=True)
class Blocks:
    """A run of blocks of one layer, and their bytes."""

    run: BlockRun
    payload: memoryview


@dataclass(frozen=True)
class Commit:
    """Everything has been sent; decode goes on after the first token."""

    frames: int
    first_token_id: int
    num_tokens: int


@dataclass(frozen=True)
class Abort:
    """Prefill gives up."""

    reason: str


Frame = Open | Blocks | Commit | Abort


@dataclass(frozen=True)
class Grant:
    """Decode has reserved its blocks: which it holds already, and how many bytes it takes."""

    held_blocks: int
    credit_bytes: int


@dataclass(frozen=True)
class Ack:
    """Everything has landed and was verified."""


@dataclass(frozen=True)
class Refused:
    """The handoff is refused as a whole."""

    reason: str


Reply = Grant | Ack | Refused


def encode_frame(frame: Frame) -> bytes:
    """A PushFrame."""
    match frame:
        case Blocks(run, payload):
            header = pb.Blocks(
                sequence=run.sequence,
                layer=run.layer,
                first_block=run.first_block,
                num_blocks=run.num_blocks,
                checksum=run.checksum,
            )
            head = pb.PushFrame(blocks=header).SerializeToString()
            return b"".join((head, _PAYLOAD_TAG, _varint(len(payload)), payload))
        case Open(ticket, rank):
            message = pb.PushFrame(open=pb.Open(ticket=ticket, rank=rank))
        case Commit(frames, token, tokens):
            message = pb.PushFrame(
                commit=pb.Commit(frames=frames, first_token_id=token, num_tokens=tokens)
            )
        case Abort(reason):
            message = pb.PushFrame(abort=pb.Abort(reason=reason))
    return message.SerializeToString()


def decode_frame(wire: bytes) -> Frame:
    """Raises HandoffRefused for anything that is not a whole PushFrame."""
    if wire[:1] == bytes((_BLOCKS_TAG,)):
        return _decode_blocks(memoryview(wire))
    try:
        message = pb.PushFrame.FromString(wire)
    except DecodeError as error:
        raise HandoffRefused("a frame is not a PushFrame") from error
    match message.WhichOneof("kind"):
        case "open":
            return Open(message.open.ticket, message.open.rank)
        case "commit":
            commit = message.commit
            return Commit(commit.frames, commit.first_token_id, commit.num_tokens)
        case "abort":
            return Abort(message.abort.reason)
    raise HandoffRefused("a frame has no kind")


def _decode_blocks(wire: memoryview) -> Blocks:
    length, start = _read_varint(wire, 1)
    end = start + length
    if length > HEADER_BYTES or wire[end : end + 1] != _PAYLOAD_TAG:
        raise HandoffRefused("a frame of blocks is malformed")
    size, begin = _read_varint(wire, end + 1)
    if begin + size != len(wire):
        raise HandoffRefused("a frame of blocks is truncated or has a tail")
    try:
        header = pb.Blocks.FromString(bytes(wire[start:end]))
    except DecodeError as error:
        raise HandoffRefused("a frame of blocks is malformed") from error
    run = BlockRun(
        header.sequence, header.layer, header.first_block, header.num_blocks, header.checksum
    )
    return Blocks(run, wire[begin:])


def encode_reply(reply: Reply) -> bytes:
    """A PushReply."""
    match reply:
        case Grant(held, credit):
            message = pb.PushReply(grant=pb.Grant(held_blocks=held, credit_bytes=credit))
        case Ack():
            message = pb.PushReply(ack=pb.Ack())
        case Refused(reason):
            message = pb.PushReply(refused=pb.Refused(reason=reason))
    return message.SerializeToString()


def decode_reply(wire: bytes) -> Reply:
    """Raises HandoffRefused for anything that is not a PushReply."""
    try:
        message = pb.PushReply.FromString(wire)
    except DecodeError as error:
        raise HandoffRefused("the peer's reply is malformed") from error
    match message.WhichOneof("kind"):
        case "grant":
            return Grant(message.grant.held_blocks, message.grant.credit_bytes)
        case "ack":
            return Ack()
        case "refused":
            return Refused(message.refused.reason)
    raise HandoffRefused("the peer's reply has no kind")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(wire: memoryview, start: int) -> tuple[int, int]:
    """The value and where it ends."""
    value = 0
    for at in range(start, min(start + 5, len(wire))):
        value |= (wire[at] & 0x7F) << 7 * (at - start)
        if wire[at] < 0x80:
            return value, at + 1
    raise HandoffRefused("a frame's length is malformed")
