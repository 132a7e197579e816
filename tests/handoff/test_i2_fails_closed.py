"""Promise I2: no decode step reads an unverified block. What lands is what prefill computed, bit
for bit; what cannot be verified is refused as a whole, and both ledgers are back at 0.

Beside this file: `test_tickets.py`, `test_messages.py`, `test_stale_blocks.py`,
`test_broken_peers.py`, `test_transfer_port.py`.
"""

from __future__ import annotations

import asyncio

import torch

from tests.handoff.agents import LAYERS, TOKENS, Decode, Prefill, make_ticket, sign
from tests.handoff.raw import contents, landed


async def test_a_right_handoff_lands_bit_for_bit(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(num_tokens=3 * TOKENS)
    wire = sign(ticket)
    untouched = [block for block in range(decode.cache.num_blocks) if block not in (7, 3, 11)]
    before = contents(decode, untouched)
    decode.reserve(ticket, wire, (7, 3, 11))
    prefill.offer(ticket, wire, decode.agent.address, (1, 2), first=0)
    prefill.offer(ticket, wire, decode.agent.address, (9,), first=2)
    prefill.release(ticket, token=42)
    assert (await decode.result(ticket.handoff_id)).ok
    assert (await prefill.result(ticket.handoff_id)).ok
    assert landed(prefill, decode, (1, 2, 9), (7, 3, 11))
    assert torch.equal(contents(decode, untouched), before)
    assert not decode.finished.failed
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_blocks_that_decode_holds_are_not_sent(prefill: Prefill, decode: Decode) -> None:
    ticket = make_ticket(num_tokens=3 * TOKENS)
    wire = sign(ticket)
    before = contents(decode, (7, 3))
    decode.reserve(ticket, wire, (7, 3, 11), held=2)
    prefill.offer(ticket, wire, decode.agent.address, (1, 2, 9))
    prefill.release(ticket, token=42)
    result = await decode.result(ticket.handoff_id)
    assert result.bytes == LAYERS * decode.cache.block_bytes
    assert torch.equal(contents(decode, (7, 3)), before)
    assert landed(prefill, decode, (9,), (11,))
    await prefill.until(lambda: bool(prefill.finished.sending))
    assert (prefill.pinned(), decode.pinned()) == (0, 0)


async def test_two_handoffs_on_one_connection_do_not_mix(prefill: Prefill, decode: Decode) -> None:
    one, two = make_ticket(2 * TOKENS), make_ticket(2 * TOKENS)
    for ticket, targets in ((one, (5, 6)), (two, (7, 8))):
        decode.reserve(ticket, sign(ticket), targets)
    for first in (0, 1):
        for ticket, sources in ((one, (1, 2)), (two, (3, 4))):
            prefill.offer(
                ticket, sign(ticket), decode.agent.address, (sources[first],), first=first
            )
            await asyncio.sleep(0)
    prefill.release(two, token=2)
    prefill.release(one, token=1)
    assert (await decode.result(one.handoff_id)).ok
    assert (await decode.result(two.handoff_id)).ok
    assert landed(prefill, decode, (1, 2, 3, 4), (5, 6, 7, 8))
    await prefill.until(lambda: len(prefill.finished.sending) == 2)
    assert (prefill.pinned(), decode.pinned()) == (0, 0)
