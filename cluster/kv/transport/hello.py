"""LinkFrame and LinkReply on the wire, and the signed hello that opens a link."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from cluster.errors import HandoffRefused
from cluster.kv.assembly import BlockRun
from cluster.kv.transport.nccl_library import UNIQUE_ID_BYTES, LinkTooLarge
from cluster.ticket import CLOCK_TOLERANCE_SECONDS, TicketSigner
from pdserve.v1 import kv_transfer_pb2 as pb

HELLO_SECONDS = 30.0
"""A hello is good for so long after it was signed."""


@dataclass(frozen=True)
class Hello:
    """Which two ranks a link is to join.

    Attributes:
        link: drawn at random; names the link on both sides, never 0.
        unique_id: NCCL's name for the communicator.
        issued_at: seconds since 1970.
        slots: of the memory that either end sets aside.
        slot_bytes: bytes of each.
    """

    link: int
    prefill_worker: str
    prefill_incarnation: str
    prefill_rank: int
    decode_worker: str
    decode_incarnation: str
    decode_rank: int
    unique_id: bytes
    issued_at: float
    slots: int
    slot_bytes: int


@dataclass(frozen=True)
class Payload:
    """The next payload on the link.

    Attributes:
        summed: it counts for the checksum in the commit.
        slot: where it is.
    """

    handoff_id: str
    run: BlockRun
    size: int
    summed: bool
    slot: int


def encode_hello(hello: Hello, signer: TicketSigner) -> bytes:
    """Signed by the cluster's secret."""
    message = pb.LinkHello(
        link=hello.link,
        prefill_worker=hello.prefill_worker,
        prefill_incarnation=hello.prefill_incarnation,
        prefill_rank=hello.prefill_rank,
        decode_worker=hello.decode_worker,
        decode_incarnation=hello.decode_incarnation,
        decode_rank=hello.decode_rank,
        unique_id=hello.unique_id,
        issued_at=hello.issued_at,
        slots=hello.slots,
        slot_bytes=hello.slot_bytes,
    )
    proof = signer.proof(message.SerializeToString(deterministic=True))
    message.proof = proof
    return pb.LinkFrame(hello=message).SerializeToString()


def decode_hello(wire: bytes, signer: TicketSigner) -> Hello:
    """Raises HandoffRefused unless a process of this cluster signed it, and lately."""
    message = _frame(wire).hello
    proof, message.proof = message.proof, b""
    if not signer.proves(message.SerializeToString(deterministic=True), proof):
        raise HandoffRefused("the link's hello is not signed by this cluster")
    age = time.time() - message.issued_at
    if not -CLOCK_TOLERANCE_SECONDS <= age <= HELLO_SECONDS:
        raise HandoffRefused("the link's hello is too old, or the hosts' clocks differ too much")
    if len(message.unique_id) != UNIQUE_ID_BYTES or not message.link:
        raise HandoffRefused("the link's hello is malformed")
    return Hello(
        message.link,
        message.prefill_worker,
        message.prefill_incarnation,
        message.prefill_rank,
        message.decode_worker,
        message.decode_incarnation,
        message.decode_rank,
        message.unique_id,
        message.issued_at,
        message.slots,
        message.slot_bytes,
    )


def encode_payloads(payloads: Sequence[Payload]) -> bytes:
    message = pb.LinkPayloads(payloads=[_payload(payload) for payload in payloads])
    return pb.LinkFrame(payloads=message).SerializeToString()


def _payload(payload: Payload) -> pb.LinkPayload:
    run = payload.run
    blocks = pb.Blocks(
        sequence=run.sequence,
        layer=run.layer,
        num_layers=run.num_layers,
        first_block=run.first_block,
        num_blocks=run.num_blocks,
    )
    return pb.LinkPayload(
        handoff_id=payload.handoff_id,
        blocks=blocks,
        size=payload.size,
        summed=payload.summed,
        slot=payload.slot,
    )


def decode_payloads(wire: bytes) -> list[Payload]:
    """Raises HandoffRefused for anything else."""
    frame = _frame(wire)
    if frame.WhichOneof("kind") != "payloads":
        raise HandoffRefused("a message on a link announces no payload")
    return [
        Payload(
            message.handoff_id,
            BlockRun(
                message.blocks.sequence,
                message.blocks.layer,
                message.blocks.num_layers,
                message.blocks.first_block,
                message.blocks.num_blocks,
            ),
            message.size,
            message.summed,
            message.slot,
        )
        for message in frame.payloads.payloads
    ]


def _frame(wire: bytes) -> pb.LinkFrame:
    try:
        return pb.LinkFrame.FromString(wire)
    except DecodeError as error:
        raise HandoffRefused("a message on a link is malformed") from error


def encode_link_reply(refusal: HandoffRefused | None = None, free: Sequence[int] = ()) -> bytes:
    """What the receiver says: why the link is refused, or that it is up; later, which slots'
    payloads have been read."""
    refused = "" if refusal is None else str(refusal)
    too_large = isinstance(refusal, LinkTooLarge)
    return pb.LinkReply(refused=refused, free=free, too_large=too_large).SerializeToString()


def decode_link_reply(wire: bytes) -> Sequence[int]:
    """Slots that are free. Raises HandoffRefused if the link is refused – LinkTooLarge if a smaller
    one may not be – and for anything else."""
    try:
        reply = pb.LinkReply.FromString(wire)
    except DecodeError as error:
        raise HandoffRefused("the peer's reply to a link is malformed") from error
    if reply.refused:
        refusal = LinkTooLarge if reply.too_large else HandoffRefused
        raise refusal(f"the peer refused the link: {reply.refused}")
    return reply.free
