"""A request's deltas in their wire form: one stream's, so that what repeats is built once."""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.v1 import common_pb2, inference_pb2
from router.output import Delta, FinishReason, Logprob, TokenLogprobs

_FINISH = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
_DELTA = inference_pb2.GenerateResponse.DESCRIPTOR.fields_by_name["delta"].number
_TAG = bytes((_DELTA << 3 | 2,))
"""Field and wire type of a message inside a message."""


class DeltaEncoder:
    """Makes a stream's serialised GenerateResponses; there is one for every token.

    A message is its parts one after the other, so the request's id is serialised once, and the
    delta alone each time, in a message object that is used again and again.
    """

    def __init__(self, request_id: str) -> None:
        self._head = inference_pb2.GenerateResponse(request_id=request_id).SerializeToString()
        self._head += _TAG
        self._message = inference_pb2.TokenDelta()

    def __call__(self, delta: Delta) -> bytes:
        """Unset fields are left alone: each costs time."""
        index, offset, token_ids, text, logprobs, finish, stop, text_offset = delta
        message = self._message
        message.Clear()
        if index:
            message.index = index
        if offset:
            message.offset = offset
        message.token_ids.extend(token_ids)
        if text:
            message.text = text
        if text_offset:
            message.text_offset = text_offset
        if logprobs:
            message.logprobs.extend(_logprobs(logprobs))
        if finish is not None:
            message.finish_reason = _FINISH[finish]
            if isinstance(stop, str):
                message.stop_string = stop
            elif stop is not None:
                message.stop_token_id = stop
        body = message.SerializeToString()
        size = len(body)
        if size < 0x80:
            return self._head + _LENGTHS[size] + body
        return self._head + _varint(size) + body


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


_LENGTHS = [bytes((size,)) for size in range(0x80)]


def _logprobs(entries: Iterable[TokenLogprobs]) -> list[common_pb2.TokenLogprobs]:
    return [
        common_pb2.TokenLogprobs(sampled=_logprob(e.sampled), top=map(_logprob, e.top))
        for e in entries
    ]


def _logprob(entry: Logprob) -> common_pb2.Logprob:
    return common_pb2.Logprob(
        token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, text=entry.text
    )
