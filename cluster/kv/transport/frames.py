"""PushFrame and PushReply on the wire.

A frame of blocks is ordinary protobuf in one fixed encoding: a header of 48 bytes, the payload, and
its checksum in 10 bytes. So it is sent from where it lies and read into where it belongs, and never
passes through protobuf's own copies; and the checksum is taken while the payload passes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.transport.streams.reading import Incoming
from cluster.kv.transport.views import bytes_view
from pdserve.v1 import kv_transfer_pb2 as pb

_HEADER = struct.Struct("<BB BI BI BI BI BI 15s B5s")
_BLOCKS_TAG, _PAYLOAD_TAG = 0x12, 0x7A  # fields 2 and 15, length-delimited
_FIELDS = (0x0D, 0x15, 0x1D, 0x25, 0x2D)  # fixed32 1 to 5
_BLOCKS_BYTES = 25
_PAD = bytes((0x72, 13)) + bytes(13)  # field 14
_CHECKSUM = struct.Struct("<2sQ")
_CHECKSUM_TAG = bytes((0x81, 0x01))  # field 16, fixed64
CONTROL_BYTES = 8192
"""No frame without blocks is longer; nothing longer is parsed."""
HEADER_BYTES, CHECKSUM_BYTES = _HEADER.size, _CHECKSUM.size


@dataclass(frozen=True)
class Open:
    """First on a push: the signed ticket, the sender's rank, the link that payloads come over."""

    ticket: bytes
    rank: int
    link: int = 0


@dataclass(frozen=True)
class Blocks:
    """A run of blocks of some layers, and their bytes: uint8, flat.

    Attributes:
        checksum: as it came with the frame; 0 if it came over a link.
    """

    run: BlockRun
    payload: torch.Tensor
    checksum: int = 0


@dataclass(frozen=True)
class Coming:
    """A run of blocks whose bytes are still to be read.

    Attributes:
        size: of the payload.
    """

    run: BlockRun
    size: int
    rest: Incoming


@dataclass(frozen=True)
class Commit:
    """Everything has been sent; decode goes on after the first token.

    Attributes:
        checksum: of payloads that crossed a link; 0 if none was checked.
    """

    frames: int
    first_token_id: int
    num_tokens: int
    checksum: int = 0


@dataclass(frozen=True)
class Abort:
    """Prefill gives up."""

    reason: str


Frame = Open | Blocks | Coming | Commit | Abort


@dataclass(frozen=True)
class Grant:
    """Decode has reserved its blocks: how much it holds already, and how many bytes it takes."""

    held_tokens: int
    credit_bytes: int


@dataclass(frozen=True)
class Ack:
    """Everything has landed and was verified."""


@dataclass(frozen=True)
class Refused:
    """The handoff is refused as a whole."""

    reason: str


Reply = Grant | Ack | Refused


def encode_frame(frame: Open | Blocks | Commit | Abort) -> bytes:
    """A PushFrame."""
    match frame:
        case Blocks(run, payload, checksum):
            header = blocks_header(run, payload.numel())
            return header + bytes(payload.numpy()) + blocks_checksum(checksum)
        case Open(ticket, rank, link):
            message = pb.PushFrame(open=pb.Open(ticket=ticket, rank=rank, link=link))
        case Commit(frames, token, tokens, checksum):
            message = pb.PushFrame(
                commit=pb.Commit(
                    frames=frames, first_token_id=token, num_tokens=tokens, checksum=checksum
                )
            )
        case Abort(reason):
            message = pb.PushFrame(abort=pb.Abort(reason=reason))
    return message.SerializeToString()


def decode_frame(wire: bytes) -> Frame:
    """Raises HandoffRefused for anything that is not a whole PushFrame."""
    if wire[:1] == bytes((_BLOCKS_TAG,)):
        return _decode_blocks(wire)
    if len(wire) > CONTROL_BYTES:
        raise HandoffRefused("a frame is too long")
    try:
        message = pb.PushFrame.FromString(wire)
    except DecodeError as error:
        raise HandoffRefused("a frame is not a PushFrame") from error
    if message.pad or message.payload or message.checksum:
        raise HandoffRefused("a frame without blocks has a payload")
    match message.WhichOneof("kind"):
        case "open":
            return Open(message.open.ticket, message.open.rank, message.open.link)
        case "commit":
            commit = message.commit
            return Commit(commit.frames, commit.first_token_id, commit.num_tokens, commit.checksum)
        case "abort":
            return Abort(message.abort.reason)
    raise HandoffRefused("a frame has no kind")


def blocks_header(run: BlockRun, size: int) -> bytes:
    """Of a frame of blocks; its payload, of `size` bytes, and its checksum follow."""
    tags = _FIELDS
    return _HEADER.pack(
        _BLOCKS_TAG, _BLOCKS_BYTES,
        tags[0], run.sequence, tags[1], run.layer, tags[2], run.num_layers, tags[3],
        run.first_block, tags[4], run.num_blocks, _PAD, _PAYLOAD_TAG, _long_varint(size),
    )  # fmt: skip


def blocks_checksum(checksum: int) -> bytes:
    """The end of a frame of blocks."""
    return _CHECKSUM.pack(_CHECKSUM_TAG, checksum)


def decode_checksum(end: bytes | bytearray) -> int:
    """Raises HandoffRefused for anything but the end of a frame of blocks."""
    tag, checksum = _CHECKSUM.unpack(end)
    if tag != _CHECKSUM_TAG:
        raise HandoffRefused("a frame of blocks ends without its checksum")
    return int(checksum)


def decode_head(message: Incoming) -> Coming:
    """A frame of which only the head has come. Raises HandoffRefused if it is none of blocks."""
    if message.head[:1] != bytes((_BLOCKS_TAG,)):
        raise HandoffRefused("a frame is too long")
    size = message.size - HEADER_BYTES - CHECKSUM_BYTES
    return Coming(_decode_header(message.head, size), size, message)


def _decode_blocks(wire: bytes) -> Blocks:
    end = len(wire) - CHECKSUM_BYTES
    if end < HEADER_BYTES:
        raise HandoffRefused("a frame of blocks is truncated")
    run = _decode_header(wire[:HEADER_BYTES], end - HEADER_BYTES)
    return Blocks(run, bytes_view(wire)[HEADER_BYTES:end], decode_checksum(wire[end:]))


def _decode_header(head: bytes, size: int) -> BlockRun:
    values = _HEADER.unpack(head)
    run = BlockRun(*values[3:12:2])
    if size < 0 or blocks_header(run, size) != head:
        raise HandoffRefused("a frame of blocks is malformed, truncated or has a tail")
    return run


def encode_reply(reply: Reply) -> bytes:
    """A PushReply."""
    match reply:
        case Grant(held, credit):
            message = pb.PushReply(grant=pb.Grant(held_tokens=held, credit_bytes=credit))
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
            return Grant(message.grant.held_tokens, message.grant.credit_bytes)
        case "ack":
            return Ack()
        case "refused":
            return Refused(message.refused.reason)
    raise HandoffRefused("the peer's reply has no kind")


def _long_varint(value: int) -> bytes:
    """Five bytes, whatever the value."""
    return bytes((value >> 7 * i & 0x7F | (0x80 if i < 4 else 0)) for i in range(5))
