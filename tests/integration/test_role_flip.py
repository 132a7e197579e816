"""A worker changes its role under load: nothing is lost, nothing is reloaded, answers are exact."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import Unavailable
from cluster.store.client import connect
from cluster.store.registry import Registry
from tests.integration.simulated import answer, config, simulated_cluster

ROLES = {"w-0": "prefill", "w-1": "prefill", "w-2": "prefill", "w-3": "decode"}
WAVE = 40


async def test_roles_change_under_load(tmp_path: Path) -> None:
    rng = random.Random(5)
    split = config(placement={"disaggregate": "always"})
    async with simulated_cluster(tmp_path, ROLES, split) as cluster:
        engine = cluster.hosts["w-0"]._engine
        prompts = [
            [rng.randrange(800) for _ in range(rng.randrange(1, 900))] for _ in range(4 * WAVE)
        ]
        asked: list[asyncio.Task[tuple[list[int], str, str]]] = []

        async def ask(i: int) -> tuple[list[int], str, str]:
            await asyncio.sleep(i % WAVE * 0.02)
            tokens, completed = await cluster.generate(prompts[i], max_tokens=20 + i % 60)
            (report,) = completed.completions
            return tokens, report.prefill_worker, report.decode_worker

        async def wave() -> None:
            """Asks for WAVE more; returns while half of them run or are still to come."""
            new = [asyncio.create_task(ask(i)) for i in range(len(asked), len(asked) + WAVE)]
            asked.extend(new)
            ended = asyncio.as_completed(new)
            for _ in range(WAVE // 2):
                await next(ended)

        async def flip(worker_id: str, role: str, drain_seconds: float = 60.0) -> None:
            await cluster.hosts[worker_id].set_role(role, drain_seconds)

        await wave()
        await flip("w-0", "decode")
        await flip("w-3", "prefill")
        await wave()
        await flip("w-1", "decode", 0.0)  # what runs there goes on
        await flip("w-0", "prefill")
        await wave()
        await flip("w-2", "decode")
        await flip("w-3", "decode")
        await wave()
        answers = await asyncio.gather(*asked)
        assert [tokens for tokens, _, _ in answers] == [
            answer(p, 20 + i % 60) for i, p in enumerate(prompts)
        ]
        second, third, fourth = (answers[n * WAVE : (n + 1) * WAVE] for n in (1, 2, 3))
        assert "w-0" in {decode for _, _, decode in second}
        assert "w-1" in {decode for _, _, decode in third}
        assert "w-0" in {prefill for _, prefill, _ in fourth}
        record = cluster.hosts["w-0"].record
        assert (record.role, record.epoch, record.state) == ("prefill", 2, "ready")
        assert cluster.hosts["w-0"]._engine is engine
        metrics = cluster.router.metrics.registry
        assert not metrics.get_sample_value("pdserve_retries_total", {"model": "made-up"})
        for host in cluster.hosts.values():
            held = await host._engine.holdings()  # type: ignore[union-attr]
            assert (held.ledger, held.blocks_used) == ((), 0)

        client = await connect(cluster.store.url, 30.0)
        registry = Registry(client, split.name)
        late = replace(record, role="decode", epoch=1)
        assert await registry.put_worker(late, 10.0)  # no newer life: nobody has to end
        assert (await registry.get_worker("w-0")).role == "prefill"  # type: ignore[union-attr]
        await client.aclose()


async def test_a_flip_without_the_store_changes_nothing(tmp_path: Path) -> None:
    async with simulated_cluster(tmp_path, ROLES, config()) as cluster:
        host = cluster.hosts["w-0"]
        assert await host.set_role("prefill", 1.0) == 0
        cluster.store.stop()
        with pytest.raises(Unavailable, match="store"):
            await host.set_role("decode", 1.0)
        assert (host.record.role, host.record.epoch, host.record.state) == ("prefill", 0, "ready")
        tokens, _ = await cluster.generate([1, 2, 3], max_tokens=4)
        assert tokens == answer([1, 2, 3], 4)
