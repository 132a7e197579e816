"""The buffer between a request and its client: order, merging, the limit, the end."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import Overloaded, Unavailable
from router.buffer import MERGED_TOKENS, OutputBuffer
from router.output import Completed, Delta, FinishReason

DONE = Completed(1, 2, 0, ())


def delta(index: int, offset: int, count: int = 1) -> Delta:
    return Delta(index, offset, tuple(range(offset, offset + count)), "x" * count)


async def test_what_waits_is_merged_by_completion() -> None:
    buffer = OutputBuffer()
    for index, offset in [(0, 0), (0, 1), (1, 0), (0, 2)]:
        assert buffer.put(delta(index, offset))
    last = Delta(0, 3, (), "", finish=FinishReason.STOP, stop="\n")
    buffer.put(last)
    first, second, third = await buffer.take()
    assert (first.index, first.offset, first.token_ids, first.text) == (0, 0, (0, 1), "xx")
    assert (second.index, third.index) == (1, 0)
    assert (third.offset, third.finish, third.stop) == (2, FinishReason.STOP, "\n")


async def test_merged_messages_stay_small() -> None:
    buffer = OutputBuffer()
    for offset in range(2 * MERGED_TOKENS):
        buffer.put(delta(0, offset))
    assert [len(d.token_ids) for d in await buffer.take()] == [MERGED_TOKENS] * 2


async def test_a_taker_waits_for_the_end() -> None:
    buffer = OutputBuffer()
    taker = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    assert not taker.done()
    buffer.close(DONE)
    assert await taker == []
    assert buffer.completed is DONE


async def test_what_was_sent_comes_before_the_error() -> None:
    buffer = OutputBuffer()
    buffer.put(delta(0, 0))
    buffer.close(Unavailable("gone"))
    assert len(await buffer.take()) == 1
    with pytest.raises(Unavailable):
        await buffer.take()


async def test_beyond_the_limit_it_is_cut() -> None:
    buffer = OutputBuffer(limit_tokens=2)
    cuts: list[bool] = []
    buffer.on_cut = lambda: cuts.append(True)
    assert buffer.put(delta(0, 0, 2))
    assert not buffer.put(delta(0, 2))
    buffer.close(Overloaded("slow"))
    buffer.cut()
    assert cuts == [True]
    with pytest.raises(Overloaded):
        await buffer.take()


async def test_a_delta_goes_directly_only_while_the_taker_waits_and_nothing_is_in_front() -> None:
    buffer, sent = OutputBuffer(), []
    ready = True

    def direct(delta: Delta) -> bool:
        if ready:
            sent.append(delta.offset)
        return ready

    buffer.direct = direct
    buffer.put(delta(0, 0))
    assert sent == []  # nobody has come for it yet
    assert [d.offset for d in await buffer.take()] == [0]
    buffer.put(delta(0, 1))
    assert sent == []  # the taker still has what it took in its hands
    assert [d.offset for d in await buffer.take()] == [1]
    waiting = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    buffer.put(delta(0, 2))
    buffer.put(delta(0, 3))
    assert sent == [2, 3]
    ready = False
    buffer.put(delta(0, 4))
    ready = True
    buffer.put(delta(0, 5))  # behind the one that could not go
    assert sent == [2, 3]
    assert [(d.offset, len(d.token_ids)) for d in await waiting] == [(4, 2)]
