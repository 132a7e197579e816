"""Simulated engines behind the real router, worker host and protocol: answers are exact."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from pdserve.v1 import operator_pb2, operator_pb2_grpc
from tests.integration.simulated import answer, config, simulated_cluster

SPLIT = {"p-0": "prefill", "p-1": "prefill", "d-0": "decode", "d-1": "decode"}


async def test_answers_are_exact_through_the_handoff(tmp_path: Path) -> None:
    rng = random.Random(3)
    split = config(placement={"disaggregate": "always"})
    async with simulated_cluster(tmp_path, SPLIT, split) as cluster:
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


async def test_whole_where_it_is_better_split_where_that_is(tmp_path: Path) -> None:
    """Alone, a request gains nothing from a handoff; beside prompts that keep prefill busy and
    decodes that a prompt would stall, it does. Either way it is the same answer."""
    rng = random.Random(4)
    settings = config({"speed": 2.0}, targets={"ttft_seconds": 2.0, "tpot_seconds": 0.01})
    roles = {"p-0": "prefill", "d-0": "decode"}
    async with simulated_cluster(tmp_path, roles, settings) as cluster:
        prompt = [rng.randrange(800) for _ in range(700)]
        tokens, completed = await cluster.generate(prompt, max_tokens=8)
        report = completed.completions[0]
        assert tokens == answer(prompt, 8)
        assert report.prefill_worker == report.decode_worker != ""
        assert not report.HasField("handoff")
        prompts = [[rng.randrange(800) for _ in range(3000)] for _ in range(24)]
        answers = await asyncio.gather(*(cluster.generate(p, max_tokens=24) for p in prompts))
        assert [tokens for tokens, _ in answers] == [answer(p, 24) for p in prompts]
        split = [c for _, c in answers if c.completions[0].HasField("handoff")]
        assert split
        operator = operator_pb2_grpc.OperatorStub(cluster.channel)
        why = await operator.Explain(operator_pb2.ExplainRequest(request_id=cluster.last_id))
        (decision,) = why.decisions
        assert decision.chosen.cost <= min(loser.cost for loser in decision.losers) * 1.1
        assert decision.observed_ttft_seconds > 0
        with pytest.raises(grpc.aio.AioRpcError, match="does not remember"):
            await operator.Explain(operator_pb2.ExplainRequest(request_id="unknown"))


async def test_one_pool_empty(tmp_path: Path) -> None:
    for role in ("prefill", "decode"):
        async with simulated_cluster(tmp_path / role, {"w-0": role}, config()) as cluster:
            tokens, completed = await cluster.generate([1, 2, 3], max_tokens=5)
            assert tokens == answer([1, 2, 3], 5)
            assert completed.completions[0].prefill_worker == "w-0"


def test_no_torch_and_no_vllm_on_the_way() -> None:
    code = (
        "import sys, asyncio\n"
        "import cluster.control.compose, cluster.engine.simulated.engine\n"
        "assert not {'torch', 'vllm', 'ray'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)
