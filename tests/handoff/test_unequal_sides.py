"""Handoffs between engines that are cut differently: other ranks, block sizes, orders. Every token
lands in every rank that needs it; what decode holds and what is not the prompt's is not touched."""

from __future__ import annotations

import asyncio

import pytest
import torch

from cluster.kv.transport.frames import Ack, Reply
from cluster.kv.transport.grpc_streams import GrpcInbound
from tests.handoff.agents import LAYERS, SIGNER
from tests.handoff.engines import Engine, compute, packed, reserve, ticket_between

TP = [(1, 2), (2, 1), (2, 2), (2, 4), (4, 2), (1, 4), (4, 1)]


async def assert_lands(
    prefill: Engine, decode: Engine, num_tokens: int, held_blocks: int = 0, chunks: int = 1
) -> None:
    """One handoff: the tokens that were not held arrive, and nothing else changes."""
    ticket = ticket_between(prefill, decode, num_tokens)
    everything = [decode.kv(range(decode.blocks), rank) for rank in range(len(decode.sides))]
    ids = reserve(decode, ticket, held_blocks)
    sources = compute(prefill, decode, ticket, range(len(prefill.prefills)), chunks)
    for side in (*decode.sides, *prefill.prefills):
        assert (await side.result(ticket.handoff_id)).ok
    held = held_blocks * decode.geometry.tokens
    sent, got = prefill.model_kv(sources), decode.model_kv(ids)
    assert torch.equal(got[:, :, held:num_tokens], sent[:, :, held:num_tokens])
    others = [b for b in range(decode.blocks) if b not in ids[held_blocks:]]
    for rank, before in enumerate(everything):
        tokens = decode.geometry.tokens
        kept = before.unflatten(2, (-1, tokens))[:, :, others].flatten(2, 3)
        assert torch.equal(decode.kv(others, rank), kept)
    for side in prefill.prefills:
        await side.until(lambda side=side: bool(side.finished.sending))  # type: ignore[misc]
    assert all(side.finished.recving and not side.finished.failed for side in decode.sides)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), TP)
async def test_ranks(prefill_ranks: int, decode_ranks: int, heads: int) -> None:
    """Also with fewer heads than ranks: several ranks hold the same one."""
    with (
        Engine("prefill", prefill_ranks, heads, 4) as prefill,
        Engine("decode", decode_ranks, heads, 4) as decode,
    ):
        await assert_lands(prefill, decode, num_tokens=19, chunks=2)


@pytest.mark.parametrize("num_tokens", [1, 8, 16, 37, 64])
@pytest.mark.parametrize(("prefill_tokens", "decode_tokens"), [(4, 16), (16, 4), (6, 4), (4, 6)])
async def test_block_sizes(prefill_tokens: int, decode_tokens: int, num_tokens: int) -> None:
    """Also where neither is a multiple of the other."""
    with (
        Engine("prefill", 1, 2, prefill_tokens) as prefill,
        Engine("decode", 1, 2, decode_tokens) as decode,
    ):
        await assert_lands(prefill, decode, num_tokens, chunks=3)


@pytest.mark.parametrize("held_blocks", [1, 2, 3, 7])
@pytest.mark.parametrize(("prefill_tokens", "decode_tokens"), [(16, 4), (6, 4), (4, 4), (4, 8)])
async def test_held_tokens_that_end_within_a_block_of_prefill(
    prefill_tokens: int, decode_tokens: int, held_blocks: int
) -> None:
    """Decode's cached blocks may be shared: the part of prefill's block that covers them lands
    nowhere."""
    with (
        Engine("prefill", 1, 2, prefill_tokens) as prefill,
        Engine("decode", 1, 2, decode_tokens) as decode,
    ):
        await assert_lands(prefill, decode, num_tokens=60, held_blocks=held_blocks)


@pytest.mark.parametrize(
    ("order_of_prefill", "order_of_decode"), [(1, None), (None, 1), (1, 2), (1, 1)]
)
@pytest.mark.parametrize("tokens", [(4, 4), (4, 8), (8, 4)])
async def test_orders(
    tokens: tuple[int, int], order_of_prefill: int | None, order_of_decode: int | None
) -> None:
    """An attention kernel's own order of a block on either side, or another on each."""
    sides = zip(tokens, (order_of_prefill, order_of_decode), strict=True)
    first, second = [None if seed is None else packed(size, seed) for size, seed in sides]
    with (
        Engine("prefill", 1, 2, tokens[0], first) as prefill,
        Engine("decode", 1, 2, tokens[1], second) as decode,
    ):
        await assert_lands(prefill, decode, num_tokens=21, held_blocks=1, chunks=2)


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(2, 4), (4, 2), (1, 2), (2, 1)])
async def test_everything_at_once(prefill_ranks: int, decode_ranks: int) -> None:
    with (
        Engine("prefill", prefill_ranks, 2, 6, packed(6, 1)) as prefill,
        Engine("decode", decode_ranks, 2, 8, packed(8, 2)) as decode,
    ):
        await assert_lands(prefill, decode, num_tokens=45, held_blocks=2, chunks=3)


@pytest.mark.parametrize("missing", [0, 1])
async def test_without_one_rank_of_prefill_nothing_is_complete(missing: int) -> None:
    """Half of the heads have landed and are committed; the lease ends it."""
    with Engine("prefill", 2, 2, 4) as prefill, Engine("decode", 1, 2, 4) as decode:
        ticket = ticket_between(prefill, decode, 8)
        reserve(decode, ticket)
        there = 1 - missing
        compute(prefill, decode, ticket, [there])
        assert (await prefill.prefills[there].result(ticket.handoff_id)).ok
        (side,) = decode.decodes
        assert not side.finished.recving
        side.run_out(ticket)
        result = await side.result(ticket.handoff_id)
        assert result.error == "the lease ran out before every block had arrived"
        assert result.bytes == LAYERS * 2 * side.cache.block_bytes // 2
        assert side.finished.failed == {f"d-{ticket.handoff_id}"}
        assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_one_rank_that_fails_ends_the_pushes_of_the_others() -> None:
    """Rank 1 gives up while rank 0 is under way and silent: it need not wait for the lease."""
    with Engine("prefill", 2, 2, 4) as prefill, Engine("decode", 1, 2, 4) as decode:
        ticket = ticket_between(prefill, decode, 8)
        reserve(decode, ticket)
        ids = prefill.blocks_for(8)
        for side in prefill.prefills:
            side.arrive(ticket, SIGNER.sign(ticket), *decode.addresses)
            side.compute(ticket, ids[:1])
        (taker,) = decode.decodes
        await taker.until(lambda: taker.frames(ticket) >= 2)
        prefill.prefills[1].release(ticket, token=None)
        async with asyncio.timeout(10):
            assert (await prefill.prefills[0].result(ticket.handoff_id)).error
            assert (await taker.result(ticket.handoff_id)).error
        prefill.prefills[0].release(ticket, token=None)
        for side in prefill.prefills:
            await side.until(lambda side=side: bool(side.finished.sending))  # type: ignore[misc]
        assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_ranks_must_agree_on_the_first_token() -> None:
    with Engine("prefill", 2, 2, 4) as prefill, Engine("decode", 1, 2, 4) as decode:
        ticket = ticket_between(prefill, decode, 8)
        reserve(decode, ticket)
        ids = prefill.blocks_for(8)
        for rank, side in enumerate(prefill.prefills):
            side.arrive(ticket, SIGNER.sign(ticket), *decode.addresses)
            side.compute(ticket, ids)
            side.release(ticket, token=rank)
        error = (await decode.sides[0].result(ticket.handoff_id)).error
        assert error == "prefill's ranks do not agree on the first token"
        assert decode.sides[0].finished.failed
        for side in prefill.prefills:
            await side.until(lambda side=side: bool(side.finished.sending))  # type: ignore[misc]
        assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_a_rank_that_leaves_with_its_verdict_takes_nothing_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its peer closes the stream as soon as it has read the verdict: the other rank's part is still
    on its way, and the handoff stands."""
    send = GrpcInbound.send

    async def send_and_be_left(self: GrpcInbound, reply: Reply) -> None:
        if isinstance(reply, Ack):
            raise asyncio.CancelledError
        await send(self, reply)

    monkeypatch.setattr(GrpcInbound, "send", send_and_be_left)
    with Engine("prefill", 2, 2, 4) as prefill, Engine("decode", 1, 2, 4) as decode:
        ticket = ticket_between(prefill, decode, 19)
        ids = reserve(decode, ticket, 0)
        sources = compute(prefill, decode, ticket, range(2), 1)
        assert (await decode.sides[0].result(ticket.handoff_id)).error == ""
        sent, got = prefill.model_kv(sources), decode.model_kv(ids)
        assert torch.equal(got[:, :, :19], sent[:, :, :19])
        assert decode.pinned() == 0
