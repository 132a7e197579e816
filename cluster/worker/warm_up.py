"""A worker's first requests, which are its own."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import replace

from cluster.engine.protocol import Engine, EngineInfo, EngineRequest, Guide, Sampling
from cluster.errors import EngineFailed


async def warm_up(engine: Engine, info: EngineInfo) -> None:
    """Runs every sampling path once, so that no user's first request pays for it."""
    prompt = [1 % info.vocab_size] * min(2 * info.block_size, info.max_model_len - 4)
    plain = Sampling(max_tokens=2, temperature=0, ignore_eos=True)
    drawn = replace(
        plain, temperature=1.0, top_p=0.9, top_k=5, seed=1, presence_penalty=0.5, logprobs=1
    )
    guided = replace(plain, guide=Guide(regex="[0-9]*"))
    for i, sampling in enumerate((plain, drawn, guided)):
        request = EngineRequest(f"warm-up-{i}", prompt, sampling, cache_salt="warm-up")
        async with aclosing(engine.generate(request)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if output.finish_reason == "error":
                    raise EngineFailed("the engine failed its warm-up")
