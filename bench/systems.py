"""The two systems under the same load: a cluster through gRPC, and one vLLM in this process."""

from __future__ import annotations

import os
import random
from typing import Any, Protocol

import grpc.aio

from bench.samples import Sample, Stopwatch
from bench.vllm_args import plain_args
from cluster.config import ModelConfig
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

REQUEST_SECONDS = 300.0
LOWEST_WORD = 6
"""Below are special tokens of the model that ships."""


class System(Protocol):
    """Serves greedily, to exactly `max_tokens` tokens."""

    async def run(self, prompt: list[int], max_tokens: int) -> Sample: ...


def random_prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """A prompt that no cache holds."""
    return [rng.randrange(LOWEST_WORD, vocab_size) for _ in range(length)]


class ClusterSystem:
    """A cluster behind its router's gRPC. Close the channel yourself."""

    def __init__(self, channel: grpc.aio.Channel, model: str) -> None:
        self._stub = inference_pb2_grpc.InferenceStub(channel)
        self._model = model

    async def vocab_size(self) -> int:
        reply = await self._stub.ListModels(inference_pb2.ListModelsRequest(), timeout=20)
        return next(int(m.vocab_size) for m in reply.models if m.name == self._model)

    async def run(self, prompt: list[int], max_tokens: int) -> Sample:
        sampling = common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        request = inference_pb2.GenerateRequest(
            model=self._model, token_ids=inference_pb2.TokenIds(ids=prompt), sampling=sampling
        )
        watch = Stopwatch()
        completed = None
        async for message in self._stub.Generate(request, timeout=REQUEST_SECONDS):
            if message.HasField("delta"):
                watch.saw(message.delta.token_ids)
            elif message.HasField("completed"):
                completed = message.completed
        if completed is None:
            raise ValueError("the stream ended without its report")
        report = completed.completions[0]
        names = [field.name for field in report.phases.DESCRIPTOR.fields]
        return watch.sample(
            cached=completed.usage.cached_prompt_tokens + report.handoff.held_tokens,
            phases={name.removesuffix("_seconds"): getattr(report.phases, name) for name in names},
            handoff_bytes=report.handoff.bytes,
            transfer=report.handoff.transfer_seconds,
        )


class VllmSystem:
    """One AsyncLLM with the settings of a cluster's model, but for the connector."""

    def __init__(self, model: ModelConfig, threads: int) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**plain_args(model)))
        self._count = 0

    async def run(self, prompt: list[int], max_tokens: int) -> Sample:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        self._count += 1
        given: Any = {"prompt_token_ids": prompt}
        cached = 0
        watch = Stopwatch()
        async for output in self._llm.generate(given, params, f"bench-{self._count}"):
            watch.saw(output.outputs[0].token_ids)
            cached = max(cached, output.num_cached_tokens or 0)
        return watch.sample(cached=cached)

    def stop(self) -> None:
        self._llm.shutdown()
