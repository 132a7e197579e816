"""Simulated engines behind the real router, worker host and protocol: answers are exact."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

from tests.integration.simulated import answer, config, simulated_cluster

SPLIT = {"p-0": "prefill", "p-1": "prefill", "d-0": "decode", "d-1": "decode"}


async def test_answers_are_exact_through_the_handoff(tmp_path: Path) -> None:
    rng = random.Random(3)
    async with simulated_cluster(tmp_path, SPLIT, config()) as cluster:
        shared = [rng.randrange(800) for _ in range(300)]
        prompts = [
            shared[: rng.randrange(300)] + [rng.randrange(800) for _ in range(rng.randrange(1, 60))]
            for _ in range(60)
        ]
        answers = await asyncio.gather(
            *(cluster.generate(p, max_tokens=1 + i % 20) for i, p in enumerate(prompts))
        )
        for i, (prompt, (tokens, completed)) in enumerate(zip(prompts, answers, strict=True)):
            assert tokens == answer(prompt, 1 + i % 20)
            assert completed.usage.completion_tokens == 1 + i % 20
        handed = [c.completions[0] for _, c in answers if c.completions[0].HasField("handoff")]
        assert len(handed) > 40 and {c.handoff.transport for c in handed} == {"simulated"}
        for host in cluster.hosts.values():
            held = await host._engine.holdings()  # type: ignore[union-attr]
            assert (held.ledger, held.blocks_used) == ((), 0)


def test_no_torch_and_no_vllm_on_the_way() -> None:
    code = (
        "import sys, asyncio\n"
        "import cluster.control.compose, cluster.engine.simulated.engine\n"
        "assert not {'torch', 'vllm', 'ray'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
