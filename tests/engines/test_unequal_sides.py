"""Prefill and decode cut differently – tensor-parallel size, block size – hand off all the same:
the model that recalls a detail far back in its prompt gets every answer right."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from cluster.engine.protocol import Sampling
from examples.recall_task import make_cases
from tests.engines.pairs import RECALL, Side, split, started

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

SHAPES = {
    "one rank": {"block_size": 32},
    "two ranks": {"block_size": 32, "tensor_parallel_size": 2},
    "large blocks": {"block_size": 64},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sides() -> AsyncIterator[dict[str, Side]]:
    shapes = {name.replace(" ", "-"): settings for name, settings in SHAPES.items()}
    async with started(RECALL, shapes) as running:
        yield dict(zip(SHAPES, running, strict=True))


async def test_their_blocks_may_move(sides: dict[str, Side]) -> None:
    assert len({side.info.layout for side in sides.values()}) == 1
    assert len({side.info.geometry for side in sides.values()}) == len(SHAPES)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        ("one rank", "two ranks"),
        ("two ranks", "one rank"),
        ("one rank", "large blocks"),
        ("large blocks", "one rank"),
        ("two ranks", "large blocks"),
        ("large blocks", "two ranks"),
    ],
)
async def test_every_answer_is_right(sides: dict[str, Side], prefill: str, decode: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECALL)
    one, two = sides[prefill], sides[decode]
    sampling = Sampling(max_tokens=12, temperature=0)
    for i, case in enumerate(make_cases(seed=len(prefill) * 31 + len(decode), count=6)):
        prompt = tokenizer.encode(case.prompt)
        tokens, result = await split(one, two, f"{prefill}-{decode}-{i}", prompt, sampling)
        assert case.is_right(tokenizer.decode(tokens, skip_special_tokens=True))
        assert tokens == await two.whole(f"whole-{prefill}-{decode}-{i}", prompt, sampling)
        assert result.bytes > 0 or result.held_tokens >= len(prompt) // 32 * 32
    await one.assert_nothing_held()
    await two.assert_nothing_held()


async def test_a_prefix_that_decode_holds_is_not_sent(sides: dict[str, Side]) -> None:
    """With blocks of two sizes, what is held need not end where one of prefill's blocks does."""
    one, two = sides["large blocks"], sides["one rank"]
    start, sampling = [7 + i % 400 for i in range(96)], Sampling(max_tokens=2, temperature=0)
    await split(two, one, "warm-up", [*start, 9], sampling)
    tokens, first = await split(one, two, "cold", [*start, *range(10, 150)], sampling)
    again, second = await split(one, two, "warm", [*start, *range(10, 150)], sampling)
    assert tokens == again
    assert second.held_tokens > first.held_tokens and second.bytes < first.bytes
