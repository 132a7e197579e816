"""Requests one at a time: what each system's client waits for, and what its handoff took."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence

from bench.gpu.results import Latency
from bench.gpu.systems import Split, System, greedy, random_prompt
from bench.gpu.timing import Request

Say = Callable[[str], None]
WARM_UPS = 2
SETTLE_SECONDS = 0.2
"""Between two requests, so that one's last step does not lie in the other's first."""


async def latencies(
    systems: Sequence[tuple[System, int]],
    lengths: Sequence[int],
    runs: int,
    vocab: int,
    keep: Callable[[Sequence[Latency]], None],
    say: Say,
) -> dict[str, str]:
    """The systems take turns with the same prompts, in another order in each round, because a card
    that has just worked clocks lower; says why some were given up.

    Args:
        systems: each with the tokens to ask it for.
        keep: gets the rows of each length when they are there.
    """
    rng = random.Random()
    broken: dict[str, str] = {}
    for length in lengths:
        taken: dict[str, list[Request]] = {system.name: [] for system, _ in systems}
        for run in range(WARM_UPS + runs):
            prompt = random_prompt(rng, length, vocab)
            for system, tokens in rng.sample(systems, len(systems)):
                if system.name in broken:
                    continue
                try:
                    request = await system.run(prompt, greedy(tokens))
                except Exception as error:
                    broken[system.name] = f"at {length} tokens: {type(error).__name__}: {error}"
                    continue
                if run >= WARM_UPS:
                    taken[system.name].append(request)
                await asyncio.sleep(SETTLE_SECONDS)
        rows = [Latency.of(name, length, requests) for name, requests in taken.items() if requests]
        keep(rows)
        said = ", ".join(f"{row.system} {row.ttft_ms:.1f} ms" for row in rows)
        say(f"{length} tokens: {said}")
    return broken


async def unhidden(
    split: Split, lengths: Sequence[int], runs: int, vocab: int
) -> AsyncIterator[Latency]:
    """Handoffs of prompts that prefill has in its prefix cache and decode has not, so that next to
    no compute hides them."""
    rng = random.Random()
    again = Split(split.name, split.prefill, split.decode, again=True)
    for length in lengths:
        prompt = random_prompt(rng, length, vocab)
        requests = []
        for run in range(WARM_UPS + runs):
            request = await again.run(prompt, greedy(2))
            if run >= WARM_UPS:
                requests.append(request)
            await asyncio.sleep(SETTLE_SECONDS)
        yield Latency.of(split.name, length, requests)
