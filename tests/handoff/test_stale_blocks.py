"""Promise I2, stale references: a block that was freed and handed out anew – while it was read,
before it was read, before its KV came – never reaches a decode step as this request's.

The case others answered with the previous prompt's text and HTTP 200 (vllm#52234).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch

from cluster.kv.assembly import BlockRun
from cluster.kv.generations import Generations, Stamp
from cluster.kv.geometry import HeadRun
from cluster.kv.orders import Ready
from cluster.kv.sender import Offer
from cluster.kv.transport.frames import Ack, Blocks, Coming, Commit, Open, Refused
from cluster.kv.transport.grpc_streams import GrpcInbound, GrpcOutbound
from tests.handoff.agents import HEADS, LAYERS, TOKENS, Decode, Prefill, make_ticket, sign
from tests.handoff.raw import RawPeer, contents, whole_prompt

REUSED = "blocks were handed out anew while they were read"
TAKEN = "decode's blocks were handed out anew before their KV arrived"


async def both_refused(prefill: Prefill, decode: Decode, handoff_id: str) -> None:
    """Prefill noticed; decode discards; nothing stays pinned."""
    assert (await prefill.result(handoff_id)).error == REUSED
    assert (await decode.result(handoff_id)).error
    assert decode.finished.failed == {f"d-{handoff_id}"}
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_a_block_reused_before_it_was_read(prefill: Prefill, decode: Decode) -> None:
    """The grant came late: the offered block is another prompt's by now."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    prefill.offer(ticket, wire, decode.agent.address, (1, 2))
    prefill.release(ticket, token=42)
    await prefill.until(lambda: prefill.pinned() > 0)
    prefill.agent.generations.renew([2])
    before = contents(decode, (5, 6))
    decode.reserve(ticket, wire, (5, 6))
    await both_refused(prefill, decode, ticket.handoff_id)
    assert torch.equal(contents(decode, (5, 6)), before)


async def test_one_block_may_stand_for_several_out_of_a_window(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found in it afterwards is the last of what was written."""
    for cache in (prefill.cache, decode.cache):
        monkeypatch.setattr(cache, "kept", False)
    ticket = make_ticket(3 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (0, 0, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1, 2, 3))
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert torch.equal(contents(decode, (6,)), contents(prefill, (3,)))


async def test_blocks_may_be_reused_once_they_have_been_read(
    prefill: Prefill, decode: Decode
) -> None:
    """As a sliding window's are while their prompt goes on."""
    ticket = make_ticket(3 * TOKENS)
    wire = sign(ticket)
    whole = contents(prefill, (1, 2, 3))
    decode.reserve(ticket, wire, (5, 6, 7))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    for step in (2, 3):
        await read(prefill, ticket.handoff_id)
        prefill.agent.generations.renew([step - 1])
        for layer in prefill.cache._items:
            layer[step - 1] = 0
        prefill.compute(ticket, (step,), first=step - 1)
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert torch.equal(contents(decode, (5, 6, 7)), whole)


async def test_nobody_waits_for_a_reading_that_will_never_be(
    prefill: Prefill, decode: Decode
) -> None:
    await read(prefill, "of which nothing is known")
    ticket = make_ticket(TOKENS)
    prefill.offer(ticket, sign(ticket), decode.agent.address, (1,))  # decode never has room
    waiting = asyncio.create_task(read(prefill, ticket.handoff_id))
    await prefill.until(lambda: prefill.pinned() > 0)
    assert not waiting.done()
    prefill.release(ticket, None)
    await waiting
    await read(prefill, ticket.handoff_id)


async def read(prefill: Prefill, handoff_id: str) -> None:
    """Until what was offered of a handoff has been read."""
    done = threading.Event()
    prefill.agent.post(lambda: prefill.agent.sender.when_read([handoff_id], done.set))
    await prefill.until(done.is_set)


@pytest.mark.parametrize("layer", range(LAYERS))
async def test_a_block_reused_while_it_was_read(
    prefill: Prefill, decode: Decode, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another prompt's step overwrites the block in the middle of the copy of some layer, or while
    it is being sent."""
    gather, send = prefill.cache.gather, GrpcOutbound.send_pieces

    def reuse(layers: range) -> None:
        if layer in layers:
            prefill.agent.generations.renew([1])
            prefill.cache._items[layer][1] = 0

    def torn(layers: range, *args: object, **kwargs: object) -> None:
        gather(layers, *args, **kwargs)  # type: ignore[arg-type]
        reuse(layers)

    async def torn_as_it_leaves(
        self: GrpcOutbound, run: BlockRun, pieces: Sequence[memoryview], seed: int
    ) -> None:
        reuse(range(run.layer, run.layer + run.num_layers))
        await send(self, run, pieces, seed)

    monkeypatch.setattr(prefill.cache, "gather", torn)
    if prefill.cache.pieces(range(1), (1, 2), HeadRun(0, HEADS)):
        monkeypatch.setattr(GrpcOutbound, "send_pieces", torn_as_it_leaves)
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1, 2))
    prefill.release(ticket, token=42)
    await both_refused(prefill, decode, ticket.handoff_id)


async def test_a_block_reused_between_two_chunks(prefill: Prefill, decode: Decode) -> None:
    """A preemption whose news is late: the second chunk is of blocks that have been dealt anew."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    stamp = prefill.agent.generations.stamp((2,))
    prefill.agent.generations.renew([2])
    offer, sender = Offer(ticket.handoff_id, 1, (2,), last=True), prefill.agent.sender
    prefill.agent.post(lambda: sender.offer(offer))
    for layer in range(LAYERS):
        prefill.agent.post(lambda layer=layer: sender.layer_ready(layer, ((offer, stamp),)))  # type: ignore[misc]
    prefill.release(ticket, token=42)
    await both_refused(prefill, decode, ticket.handoff_id)


async def test_a_block_dealt_anew_after_it_was_read_is_no_fault(
    prefill: Prefill, decode: Decode
) -> None:
    """As with a sliding window, which gives blocks back while the prompt goes on behind it."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    read = contents(prefill, (1,))
    prefill.agent.generations.renew([1])
    stamp = prefill.agent.generations.stamp((2,))
    offer, sender = Offer(ticket.handoff_id, 1, (2,), last=True), prefill.agent.sender
    prefill.agent.post(lambda: sender.offer(offer))
    for layer in range(LAYERS):
        prefill.agent.post(lambda layer=layer: sender.layer_ready(layer, ((offer, stamp),)))  # type: ignore[misc]
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert torch.equal(contents(decode, (5,)), read)
    assert torch.equal(contents(decode, (6,)), contents(prefill, (2,)))


@pytest.mark.on_host
async def test_blocks_that_the_engine_does_not_keep_are_copied_before_they_leave(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sliding window's are the next tokens' by the time the socket takes them."""
    send = GrpcOutbound.send_pieces
    sent = contents(prefill, (1, 2))

    async def reuse_as_it_leaves(
        self: GrpcOutbound, run: BlockRun, pieces: Sequence[memoryview], seed: int
    ) -> None:
        if run.layer + run.num_layers == LAYERS:  # the last frame: nothing is read after it
            prefill.agent.generations.renew([1, 2])
            prefill.cache._items[LAYERS - 1][1:3] = 0
        await send(self, run, pieces, seed)

    monkeypatch.setattr(GrpcOutbound, "send_pieces", reuse_as_it_leaves)
    monkeypatch.setattr(prefill.cache, "kept", False)
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1, 2))
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert torch.equal(contents(decode, (5, 6)), sent)


async def test_blocks_dealt_anew_elsewhere_disturb_nothing(
    prefill: Prefill, decode: Decode
) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    prefill.offer(ticket, wire, decode.agent.address, (1, 2))
    prefill.release(ticket, token=42)
    await prefill.until(lambda: prefill.pinned() > 0)
    prefill.agent.generations.renew([0, 3, 4])
    decode.agent.generations.renew([0, 1, 2])
    decode.reserve(ticket, wire, (5, 6))
    assert (await decode.result(ticket.handoff_id)).ok
    assert torch.equal(contents(prefill, (1, 2)), contents(decode, (5, 6)))
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


@pytest.mark.parametrize("taken", [5, 6])
@pytest.mark.parametrize("frames_before", range(LAYERS + 1))
async def test_decode_blocks_that_were_taken_back_are_not_written(
    prefill: Prefill, decode: Decode, peer: RawPeer, frames_before: int, taken: int
) -> None:
    """Decode preempted the waiting request and another has its blocks: at whatever frame, also
    when all have landed and only the commit is missing."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    frames = [*whole_prompt(prefill, ticket, (1, 2)), Commit(LAYERS, 7, 2 * TOKENS)]
    push = peer.begin()
    await push.send(Open(wire, 0))
    await push.granted()
    await push.send(*frames[:frames_before])
    await decode.until(lambda: decode.frames(ticket) == frames_before)
    decode.agent.generations.renew([taken])
    for layer in decode.cache._items:
        layer[taken] = 0  # the other request's
    before = contents(decode, (5, 6))
    await push.send(*frames[frames_before:])
    assert (await push.end())[-1] == Refused(TAKEN)
    assert torch.equal(contents(decode, (5, 6)), before)
    assert (await decode.result(ticket.handoff_id)).error == TAKEN
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    assert decode.pinned() == 0


async def test_the_ledger_and_the_engine_hear_of_a_preempted_waiting_request(
    prefill: Prefill, decode: Decode
) -> None:
    """The waiting request loses its blocks and ends; the retry takes a ticket of its own."""
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    decode.release(ticket)
    assert "cancelled" in (await decode.result(ticket.handoff_id)).error
    prefill.compute(ticket, (2,), first=1)
    prefill.release(ticket, token=42)
    assert (await prefill.result(ticket.handoff_id)).error
    retry = make_ticket(2 * TOKENS)
    decode.reserve(retry, sign(retry), (6, 5))
    prefill.offer(retry, sign(retry), decode.agent.address, (1, 2))
    prefill.release(retry, token=42)
    assert (await decode.result(retry.handoff_id)).ok
    assert torch.equal(contents(prefill, (1, 2)), contents(decode, (6, 5)))
    await prefill.until(lambda: len(prefill.finished.sending) == 2)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


def test_a_generation_grows_with_every_use() -> None:
    generations = Generations(4)
    stamp = generations.stamp((1, 3))
    generations.renew([])
    generations.renew([0, 2])
    assert generations.still((1, 3), stamp)
    renewals = generations.renewals
    generations.renew([])
    assert generations.renewals == renewals
    generations.renew([3, 3])
    assert generations.renewals > renewals
    assert not generations.still((1, 3), stamp)
    assert generations.still((1,), stamp[:1])
    with pytest.raises(IndexError):
        generations.stamp((4,))


def _ready(stamp: Stamp, layer: int = 0, first: int = 0) -> Ready:
    return Ready(layer, first, (1, 2), stamp, None, due=False)


STEP, NEXT_STEP = (Generations(8).stamp((1, 2)) for _ in range(2))


@pytest.mark.parametrize(
    ("following", "joins"),
    [
        (_ready(STEP, layer=1), True),
        (_ready(STEP, layer=2), False),
        (_ready(NEXT_STEP, layer=1), False),
        (_ready(NEXT_STEP, layer=1, first=2), False),
    ],
)
def test_only_the_same_blocks_of_the_next_layer_share_a_frame(
    following: Ready, joins: bool
) -> None:
    assert _ready(STEP).goes_on(following) is joins


async def test_an_ended_request_is_never_written_again(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    prefill.offer(ticket, wire, decode.agent.address, (1,))
    await decode.until(lambda: decode.frames(ticket) > 0)
    decode.release(ticket)
    await decode.until(lambda: bool(decode.finished.recving))
    before = contents(decode, (5, 6))
    prefill.compute(ticket, (2,), first=1)
    prefill.release(ticket, token=42)
    assert (await prefill.result(ticket.handoff_id)).error
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert torch.equal(contents(decode, (5, 6)), before)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_a_payload_that_has_arrived_is_dropped_when_its_request_ends(
    prefill: Prefill, decode: Decode, peer: RawPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request ends between a frame's arrival and its write."""
    receive = GrpcInbound.receive
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    async def slow(self: GrpcInbound) -> object:
        frame = await receive(self)
        if isinstance(frame, Blocks | Coming):
            loop.call_soon_threadsafe(reached.set)
            await asyncio.to_thread(go_on.wait, 10)
        return frame

    monkeypatch.setattr(GrpcInbound, "receive", slow)
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    before = contents(decode, (5, 6))
    push = peer.begin()
    await push.send(Open(wire, 0), *whole_prompt(prefill, ticket, (1, 2)))
    await reached.wait()
    decode.release(ticket)
    await decode.result(ticket.handoff_id)
    go_on.set()
    replies = await push.end()
    assert not any(isinstance(reply, Ack) for reply in replies)
    assert replies[-1] == Refused("the request was cancelled")
    assert torch.equal(contents(decode, (5, 6)), before)
    assert decode.pinned() == 0


class SlowDevice:
    """A fence that the test lets pass."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        assert self.done.wait(10)


@pytest.mark.parametrize("end", ["the peer vanishes", "the request is cancelled", "the lease ends"])
async def test_blocks_are_not_given_back_while_the_device_still_writes(
    prefill: Prefill,
    decode: Decode,
    peer: RawPeer,
    end: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that was queued on a device cannot be called back: the engine gets the blocks when it
    is done, and not when the push ends."""
    device = SlowDevice()
    monkeypatch.setattr(decode.cache, "mark", lambda stream: device)
    monkeypatch.setattr(decode.cache, "_places", None)  # as it is on a device
    ticket = make_ticket(2 * TOKENS)
    wire = sign(ticket)
    decode.reserve(ticket, wire, (5, 6))
    push = peer.begin()
    await push.send(Open(wire, 0), *whole_prompt(prefill, ticket, (1, 2)))
    await push.granted()
    reservations = decode.agent.receiver._reservations
    await decode.until(lambda: reservations[ticket.handoff_id].writing > 0)
    if end == "the peer vanishes":
        await peer.close()
    elif end == "the request is cancelled":
        decode.release(ticket)
    else:
        decode.run_out(ticket)
    await decode.until(lambda: bool(reservations[ticket.handoff_id].error))
    assert decode.pinned() > 0 and not decode.finished.recving
    device.done.set()
    assert (await decode.result(ticket.handoff_id)).error
    assert decode.finished.failed == {f"d-{ticket.handoff_id}"}
    assert decode.pinned() == 0
