"""The engines inside an engine process: pdserve's, and vLLM's own with or without NIXL."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from bench.gpu.wire import EngineSpec, Generate, Generated, Sums
from bench.vllm_args import plain_args
from cluster.config import HandoffConfig
from cluster.engine.protocol import EngineInfo, EngineRequest, Holdings, TokenLogprobs

RESULT_SECONDS = 15.0


class OurEngine:
    """pdserve's engine, asked as a worker asks it."""

    def __init__(self, spec: EngineSpec) -> None:
        from cluster.engine.vllm import VllmEngine

        config = HandoffConfig.model_validate(
            {"transport": spec.transport, "link_max_ctas": spec.max_ctas}
        )
        self._engine = VllmEngine(
            spec.model, config, spec.name, f"{spec.name}-1", spec.secret, "127.0.0.1", spec.threads
        )

    async def start(self) -> EngineInfo:
        info = await self._engine.start()
        await self._engine.ask_ranks("bench_watch")
        return info

    async def generate(self, asked: Generate, first: asyncio.Event) -> Generated:
        request = EngineRequest(
            asked.name, asked.prompt.tolist(), asked.sampling, asked.salt, asked.handoff
        )
        handoff = asked.handoff.handoff_id if asked.handoff else ""
        if handoff:
            self._engine.expect_handoff(handoff)
        tokens: list[int] = []
        stamps: list[float] = []
        gaps: list[float] = []
        cached, result = 0, None
        try:
            async for output in self._engine.generate(request):
                stamps += [time.monotonic()] * len(output.token_ids)
                tokens += output.token_ids
                gaps += map(_gap, output.logprobs)
                cached = max(cached, output.cached_tokens)
                if tokens:
                    first.set()
            if handoff:
                with suppress(TimeoutError):
                    result = await asyncio.wait_for(
                        self._engine.handoff_result(handoff), RESULT_SECONDS
                    )
        finally:
            if handoff:
                self._engine.forget_handoff(handoff)
        return Generated(tuple(tokens), tuple(stamps), cached, tuple(gaps), result)

    async def holdings(self) -> Holdings:
        return await self._engine.holdings()

    async def sums(self, handoff_id: str) -> Sums:
        sums: Sums = await self._engine.ask_ranks("bench_sums", handoff_id)
        return sums

    async def stop(self) -> None:
        await self._engine.stop()


class PlainEngine:
    """vLLM as it comes."""

    def __init__(self, spec: EngineSpec) -> None:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = plain_args(spec.model)
        if spec.kind == "nixl":
            args["kv_transfer_config"] = KVTransferConfig(
                kv_connector="NixlConnector", kv_role="kv_both"
            )
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))

    async def start(self) -> EngineInfo | None:
        """It has; it has no transfer port to tell of."""
        return None

    async def generate(self, asked: Generate, first: asyncio.Event) -> Generated:
        from cluster.engine.sampling import to_vllm

        params = to_vllm(asked.sampling, None)
        if asked.remote is not None:
            params.extra_args = {"kv_transfer_params": asked.remote}
        prompt: Any = {"prompt_token_ids": asked.prompt.tolist()}
        if asked.salt:
            prompt["cache_salt"] = asked.salt
        tokens: list[int] = []
        stamps: list[float] = []
        cached, remote = 0, None
        async for output in self._llm.generate(prompt, params, asked.name):
            new = output.outputs[0].token_ids
            stamps += [time.monotonic()] * len(new)
            tokens += new
            cached = max(cached, output.num_cached_tokens or 0)
            remote = output.kv_transfer_params or remote
            if tokens:
                first.set()
        return Generated(tuple(tokens), tuple(stamps), cached, remote=remote)

    async def holdings(self) -> Holdings:
        raise ValueError("a plain vLLM keeps no ledger")

    async def sums(self, handoff_id: str) -> Sums:
        raise ValueError("a plain vLLM has no handoffs")

    async def stop(self) -> None:
        await asyncio.to_thread(self._llm.shutdown)


def _gap(position: TokenLogprobs) -> float:
    others = [p.logprob for p in position.top if p.token_id != position.sampled.token_id]
    return position.sampled.logprob - max(others) if others else float("inf")
