"""Whether a split says what one engine says, and whether it would show if it did not."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import replace

from bench.gpu.fleet import Engine
from bench.gpu.results import Control, Exact, Ledger, SameBlocks
from bench.gpu.systems import Split, System, Whole, greedy, random_prompt
from bench.gpu.timing import Request
from cluster.engine.protocol import Sampling

TOKENS = 16
BLOCK = 32
SETTLE_SECONDS = 10.0
"""An engine says what it holds after its next step."""


def samplings(seed: int) -> list[tuple[str, Sampling]]:
    drawn = Sampling(max_tokens=TOKENS, temperature=1, seed=seed, top_p=0.9, ignore_eos=True)
    return [("greedy", replace(greedy(TOKENS), logprobs=2)), ("seeded", drawn)]


async def exactness(
    split: Split, ones: Sequence[System], lengths: Sequence[int], vocab: int, reshaped: bool
) -> tuple[list[Exact], list[SameBlocks], list[Control]]:
    """The same requests to the split and to each of `ones`; `reshaped` as in `Exact`."""
    rng = random.Random(3)
    rows, blocks, controls = [], [], []
    for engine in (split.prefill, split.decode):
        # An engine's first logprobs compile a kernel, which can take longer than a ticket lives.
        _, logprobs = samplings(seed=0)[0]
        await Whole("warm-up", engine).run(random_prompt(rng, BLOCK, vocab), logprobs)
    for length in lengths:
        prompt = random_prompt(rng, length, vocab)
        for name, sampling in samplings(seed=length)[: 1 if reshaped else 2]:
            mine = await split.run(prompt, sampling)
            if not reshaped:
                blocks.append(await same_blocks(split, length, name, mine))
            for one in ones:
                theirs = await one.run(prompt, sampling)
                row = compare(split.name, one.name, length, name, mine, theirs)
                rows.append(replace(row, reshaped=reshaped))
        if length > 2 * BLOCK:
            other = random_prompt(rng, BLOCK, vocab) + array("I", prompt[BLOCK:])
            control = await split.run(other, greedy(TOKENS))
            natural = await split.run(prompt, greedy(TOKENS))
            controls.append(Control(length, control.tokens != natural.tokens))
    return rows, blocks, controls


async def same_blocks(split: Split, prompt: int, sampling: str, request: Request) -> SameBlocks:
    """Of the blocks that the prompt fills: decode writes on in the one behind them."""
    assert request.crossing is not None and split.decode.info is not None
    result = request.crossing.decode
    (sent,), (landed,) = await asyncio.gather(
        split.prefill.sums(result.handoff_id), split.decode.sums(result.handoff_id)
    )
    whole = prompt // split.decode.info.block_size
    differing = [
        f"{layer}, {block}"
        for layer in range(len(sent))
        for block in range(whole)
        if sent[layer][block] != landed[layer][block]
    ]
    return SameBlocks(
        split.name, prompt, sampling, result.transport, len(sent) * whole, len(differing),
        differing[0] if differing else "",
    )  # fmt: skip


def compare(
    pair: str, against: str, prompt: int, sampling: str, mine: Request, theirs: Request
) -> Exact:
    """How far the two agree."""
    same = 0
    while same < len(theirs.tokens) and mine.tokens[same : same + 1] == theirs.tokens[same:][:1]:
        same += 1
    parts = same < len(theirs.tokens)
    gap = theirs.gaps[same] if parts and same < len(theirs.gaps) else None
    return Exact(pair, against, prompt, sampling, len(theirs.tokens), same, gap)


async def ledgers(engines: Sequence[Engine]) -> list[Ledger]:
    """What pdserve's engines hold; waits a little for 0."""
    rows = []
    for engine in engines:
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            held = await engine.holdings()
            row = Ledger(engine.spec.name, len(held.ledger), held.blocks_used)
            if (row.entries == row.blocks == 0) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.5)
        rows.append(row)
    return rows
