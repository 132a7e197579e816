"""The same requests to both systems in turn: never at once, and the first of a pair changes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from bench.samples import Load, Sample, latency_row, load_row
from bench.systems import System, random_prompt

SETTLE_SECONDS = 1.5
"""Between two measurements: vLLM's workers go on spinning for 1 s after their last step, and would
take a core from the other system."""

Say = Callable[[str], None]


async def latencies(
    cluster: System, vllm: System, lengths: list[int], output: int, runs: int, vocab: int, say: Say
) -> list[dict[str, Any]]:
    """A row per prompt length; one pair before them is not counted."""
    rng = random.Random()
    rows = []
    for length in lengths:
        pairs: list[tuple[Sample, Sample]] = []
        for run in range(runs + 1):
            prompt = random_prompt(rng, length, vocab)
            first, second = (cluster, vllm) if run % 2 else (vllm, cluster)
            one = await first.run(prompt, output)
            await asyncio.sleep(SETTLE_SECONDS)
            two = await second.run(prompt, output)
            await asyncio.sleep(SETTLE_SECONDS)
            pairs.append((one, two) if first is cluster else (two, one))
        row = latency_row(length, [a for a, _ in pairs[1:]], [b for _, b in pairs[1:]])
        say(f"{length} tokens: TTFT x{row['ttft_ratio']:.2f}, all x{row['total_ratio']:.2f}")
        rows.append(row)
    return rows


async def throughput(
    cluster: System,
    vllm: System,
    length: int,
    output: int,
    concurrency: int,
    requests: int,
    rounds: int,
    vocab: int,
    say: Say,
) -> dict[str, Any]:
    """A row of a closed loop of `concurrency` clients; one short round each is not counted."""
    rng = random.Random()
    mine: list[Load] = []
    theirs: list[Load] = []
    for number in range(rounds + 1):
        count = requests if number else concurrency
        prompts = [random_prompt(rng, length, vocab) for _ in range(count)]
        order = (cluster, vllm) if number % 2 else (vllm, cluster)
        for system in order:
            load = await closed_loop(system, prompts, output, concurrency)
            if number:
                (mine if system is cluster else theirs).append(load)
            await asyncio.sleep(SETTLE_SECONDS)
        if number:
            say(f"round {number}: cluster {mine[-1].rate:.0f}, vLLM {theirs[-1].rate:.0f} tokens/s")
    return load_row(length, concurrency, mine, theirs)


async def closed_loop(
    system: System, prompts: list[list[int]], output: int, concurrency: int
) -> Load:
    """All prompts, `concurrency` at any time."""
    left = list(prompts)
    samples: list[Sample] = []

    async def client() -> None:
        while left:
            samples.append(await system.run(left.pop(), output))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return Load(time.perf_counter() - began, tuple(samples))
