"""How much a full decode batch slows down while KV comes in."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from bench.gpu.results import MIB, Steps
from bench.gpu.systems import Split, fresh_name, greedy, random_prompt
from bench.gpu.timing import Crossing
from bench.gpu.wire import Generate

START_SECONDS = 60.0
RUN_SECONDS = 120.0
Span = tuple[float, float]


@dataclass(frozen=True)
class Round:
    """A quiet span, then one with handoffs coming in. Seconds, CLOCK_MONOTONIC."""

    quiet: Span
    receiving: Span
    crossings: tuple[Crossing, ...]


async def steps(
    split: Split,
    batch: int,
    context: int,
    tokens: int,
    inbound: int,
    rounds: int,
    span_seconds: float,
    vocab: int,
) -> Steps:
    """Decodes `batch` sequences of `context` tokens; hands prompts of `inbound` tokens to the same
    engine one after the other, in every second span.

    Args:
        tokens: to decode per sequence; rounds that they do not outlast are left out.
    """
    rng = random.Random()
    begun = [asyncio.Event() for _ in range(batch)]
    running = [
        asyncio.create_task(
            split.decode.generate(
                Generate(
                    fresh_name(), random_prompt(rng, context, vocab), greedy(tokens), announce=True
                ),
                event,
                RUN_SECONDS,
            )
        )
        for event in begun
    ]
    try:
        again = Split(split.name, split.prefill, split.decode, again=True)
        prompt = random_prompt(rng, inbound, vocab)
        async with asyncio.timeout(START_SECONDS):
            await asyncio.gather(*(event.wait() for event in begun))
        await again.run(prompt, greedy(2))  # into prefill's cache
        seen: list[Round] = []
        while len(seen) < rounds:
            one = await _round(again, prompt, span_seconds)
            if any(task.done() for task in running):
                break  # the batch was no longer full
            seen.append(one)
        done = await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
    if not seen:
        raise ValueError("the batch ended before one round did: decode more tokens")
    return summary(split.name, batch, context, done[0].stamps, seen)


async def _round(again: Split, prompt: array[int], span_seconds: float) -> Round:
    began = time.monotonic()
    await asyncio.sleep(span_seconds)
    turned = time.monotonic()
    crossings = []
    while time.monotonic() < turned + span_seconds:
        request = await again.run(prompt, greedy(2))
        assert request.crossing is not None
        crossings.append(request.crossing)
    return Round((began, turned), (turned, time.monotonic()), tuple(crossings))


def summary(
    system: str, batch: int, context: int, stamps: Sequence[float], rounds: Sequence[Round]
) -> Steps:
    """Sorts the steps between `stamps` into quiet, receiving and other ones.

    Raises ValueError if a round has no step of some kind.
    """
    quiet, receiving, slowdowns, whole, count = [], [], [], [], 0
    for seen in rounds:
        still = [b - a for a, b in pairwise(stamps) if seen.quiet[0] <= a and b <= seen.quiet[1]]
        inside = [
            (a, b) for a, b in pairwise(stamps) if seen.receiving[0] <= a and b <= seen.receiving[1]
        ]
        windows = [(c.decode.granted_at, c.decode.ended_at) for c in seen.crossings]
        busy = [b - a for a, b in inside if any(a < end and start < b for start, end in windows)]
        if not still or not busy:
            raise ValueError("a round was shorter than its steps")
        quiet.append(fmean(still))
        receiving.append(fmean(busy))
        slowdowns.append(receiving[-1] / quiet[-1] - 1)
        whole.append(fmean(b - a for a, b in inside) / quiet[-1] - 1)
        count += len(busy)
    crossings = [c for seen in rounds for c in seen.crossings]
    return Steps(
        system, batch, context, len(rounds), 1000 * median(quiet), 1000 * median(receiving),
        median(slowdowns), median(whole), count, len(crossings),
        median(c.bytes for c in crossings) / MIB,
    )  # fmt: skip
