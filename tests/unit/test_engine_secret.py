"""Engines of one process that start at the same time, and the secret that their processes need."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from cluster.config import HandoffConfig, ModelConfig
from cluster.engine.vllm import VllmEngine
from cluster.errors import EngineFailed
from cluster.kv.connector.worker import SECRET_ENV

SECRET = b"s" * 32


class Opened(VllmEngine):
    """It fails where it would start its processes, once it may; `found` is the secret there."""

    def __init__(self) -> None:
        model = ModelConfig(name="m", path="/nowhere")
        super().__init__(model, HandoffConfig(), "w", "a", SECRET, "127.0.0.1", 1)
        self.reached, self.may_go_on = asyncio.Event(), threading.Event()
        self.found: str | None = None

    def _open(self) -> None:  # type: ignore[override]
        asyncio.run_coroutine_threadsafe(_set(self.reached), self.loop)
        assert self.may_go_on.wait(60)
        self.found = os.environ.get(SECRET_ENV)
        raise RuntimeError("no engine")

    async def end(self) -> None:
        self.loop = asyncio.get_running_loop()
        with pytest.raises(EngineFailed, match="no engine"):
            await self.start()


async def _set(event: asyncio.Event) -> None:
    event.set()


async def test_it_is_there_until_the_last_of_them_has_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(variable, "")  # the engine sets them; taken back at the end
    first, second = Opened(), Opened()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        ends = [group.create_task(engine.end()) for engine in (first, second)]
        await first.reached.wait()
        await second.reached.wait()
        first.may_go_on.set()
        await ends[0]
        second.may_go_on.set()
    assert first.found == second.found == SECRET.hex()
    assert SECRET_ENV not in os.environ
