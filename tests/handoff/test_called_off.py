"""Promise I2: a push that ends in the middle of a frame. Prefill's memory is read no more from then
on, whoever has it next, and decode makes nothing of what came: the sum that would have verified it
stands behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
import torch

from cluster.kv.sender import Release
from cluster.kv.transport.frames import CHECKSUM_BYTES, Open, encode_frame
from cluster.kv.transport.streams import sending
from cluster.kv.transport.streams.sending import Frame
from tests.handoff.agents import LAYERS, TOKENS, Decode, Prefill, make_ticket, sign
from tests.handoff.http2 import connect, data_frame, stream_headers
from tests.handoff.raw import contents, frame_of, landed

FOREIGN = 0x77
"""What the blocks' next owner writes."""


class Watch:
    """What goes to sockets, in small parts.

    Args:
        midway: called on the agent's loop once some of a payload has left and more is to come.
        blanked: called when the rest of a frame has been called off.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        midway: Callable[[], None],
        blanked: Callable[[], None] = lambda: None,
    ) -> None:
        self.left: list[bytes] = []
        self.payloads = 0
        self.blanked = 0
        front, blank = Frame.front, Frame.blank
        monkeypatch.setattr(sending, "CHUNK_BYTES", 100)
        monkeypatch.setattr(sending, "TURN_BYTES", 100)

        def watched(frame: Frame) -> list[memoryview]:
            parts = front(frame)
            self.left.append(b"".join(parts))
            if frame.outgoing is not None and frame.outgoing.sealing:
                self.payloads += 1
                if self.payloads == 2:
                    asyncio.get_running_loop().call_soon(midway)
            return parts

        def blanking(frame: Frame) -> None:
            blank(frame)
            self.blanked += 1
            blanked()

        monkeypatch.setattr(Frame, "front", watched)
        monkeypatch.setattr(Frame, "blank", blanking)


async def right_handoff(prefill: Prefill, decode: Decode) -> None:
    """On the same connections, or on new ones where they broke."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (7, 8))
    prefill.offer(ticket, wire, decode.agent.address, (3, 4))
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (3, 4), (7, 8))
    await prefill.until(lambda: f"p-{ticket.handoff_id}" in prefill.finished.sending)


@pytest.mark.on_host
@pytest.mark.parametrize("why", ["the engine takes the blocks back", "the request is cancelled"])
async def test_memory_of_a_push_that_was_called_off_is_not_read(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)

    sender = prefill.agent.sender
    cancelled = why == "the request is cancelled"

    def call_off() -> None:
        if cancelled:
            sender.release(Release(ticket.handoff_id, None))
        else:
            sender.fail(ticket.handoff_id)

    def reuse() -> None:
        for layer in prefill.cache._items:
            layer.view(torch.uint8)[[1, 2]] = FOREIGN

    watch = Watch(monkeypatch, call_off, reuse)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1, 2))
    if not cancelled:
        prefill.release(ticket, token=42)
    assert (await prefill.result(ticket.handoff_id)).error == "the request was cancelled"
    result = await decode.result(ticket.handoff_id)
    assert result.error and result.frames == 0
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    assert watch.blanked == 1  # it was in the middle of a frame
    assert bytes([FOREIGN] * 16) not in b"".join(watch.left)
    assert not bool((contents(decode, (5, 6)).view(torch.uint8) == FOREIGN).all(-1).any())
    await prefill.until(lambda: bool(prefill.finished.sending))
    await right_handoff(prefill, decode)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


@pytest.mark.parametrize("cut", [CHECKSUM_BYTES, 1])
async def test_a_stream_that_ends_before_a_sum_is_whole(
    prefill: Prefill, decode: Decode, cut: int
) -> None:
    """All of the payload is there, and none of it counts."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    frame = encode_frame(frame_of(prefill, ticket, 0, 0, (1, 2), num_layers=LAYERS))
    with connect(decode.agent.address) as port:
        port.sendall(stream_headers(1) + data_frame(1, Open(wire, 0)))
        port.sendall(data_frame(1, frame[:-cut], claimed=len(frame)))
        port.shutdown(socket.SHUT_WR)
        result = await decode.result(ticket.handoff_id)
    assert (result.error, result.frames) == ("prefill stopped half-way", 0)
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    assert decode.pinned() == 0
    await right_handoff(prefill, decode)
