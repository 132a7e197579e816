"""The `models` part of the configuration: a model, its engine, its pools and their hosts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MIB = 1 << 20


class Section(BaseModel):
    """A part of the configuration: unknown fields are errors, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SimulationConfig(Section):
    """The timing model of a simulated engine; the defaults are an 8B model's on one H200."""

    step_seconds: Annotated[
        float, Field(gt=0, description="An engine step with nothing in it, the weights' read.")
    ] = 4.8e-3
    prefill_token_seconds: Annotated[
        float, Field(ge=0, description="More per prompt token computed.")
    ] = 2.4e-5
    prefill_pair_seconds: Annotated[
        float, Field(ge=0, description="More per prompt token and token it attends to.")
    ] = 5.8e-10
    decode_sequence_seconds: Annotated[
        float, Field(ge=0, description="More per decoding sequence.")
    ] = 1.8e-5
    decode_token_seconds: Annotated[
        float, Field(ge=0, description="More per token of a decoding sequence's context.")
    ] = 3.9e-8
    kv_bytes_per_token: Annotated[int, Field(ge=1, description="What a handoff moves.")] = 131_072
    link_bytes_per_second: Annotated[float, Field(gt=0, description="Between any two workers.")] = (
        50e9
    )
    link_seconds: Annotated[float, Field(ge=0, description="A transfer's fixed part.")] = 5e-4
    num_blocks: Annotated[int, Field(ge=2, description="Of a worker's KV pool.")] = 16_384
    vocab_size: Annotated[int, Field(ge=16, description="Tokens are drawn below it.")] = 512
    seed: Annotated[int, Field(description="Of the tokens: one seed, one answer.")] = 0
    speed: Annotated[
        float, Field(gt=0, description="Times are divided by it; 1 is the timing model's.")
    ] = 1.0


class PoolConfig(Section):
    """Processes of one kind: how many, and on which hosts of the Ray cluster."""

    replicas: Annotated[int, Field(ge=0, le=4096, description="Processes to keep alive.")] = 1
    num_cpus: Annotated[float, Field(ge=0, description="CPUs Ray reserves for each.")] = 0
    resources: Annotated[
        dict[str, float],
        Field(description="Custom Ray resources each reserves: it runs on hosts that have them."),
    ] = {}
    labels: Annotated[
        dict[str, str],
        Field(
            description="Labels of the hosts it may run on, such as ray.io/accelerator-type: H100;"
            " values as in Ray's label selectors: v, !v, in(v, w), !in(v, w)."
        ),
    ] = {}
    placement: Annotated[
        Literal["spread", "pack"],
        Field(description="Over many hosts, or on few; where there is room."),
    ] = "spread"


class WorkerPoolConfig(PoolConfig):
    """The workers of one role, for one model."""

    num_gpus: Annotated[
        int | None,
        Field(ge=0, description="GPUs of each; unset: what the engine needs."),
    ] = None


_REFUSED = {
    "speculative_config": "what a drafter knows of a prompt is not handed off",
    "logits_processors": "what one knows of the first token is not handed off",
}
"""Engine arguments, and why not."""


class ModelConfig(Section):
    """One model and its two pools."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,95}$", description="What clients ask for."),
    ]
    path: Annotated[str, Field(min_length=1, description="A local directory or a hub name.")]
    engine: Annotated[
        Literal["vllm", "simulated"],
        Field(description="simulated: a timing model in place of the network, for load tests."),
    ] = "vllm"
    simulation: Annotated[SimulationConfig, Field(description="Of a simulated engine.")] = (
        SimulationConfig()
    )
    revision: Annotated[str | None, Field(description="Of a hub model.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Field(description="Of the weights.")
    ] = "auto"
    max_model_len: Annotated[
        int | None, Field(ge=2, description="Prompt and output tokens; unset: the model's own.")
    ] = None
    block_size: Annotated[
        int, Field(ge=1, le=1024, description="Tokens per KV block; on CPU a multiple of 32.")
    ] = 32
    kv_cache_bytes: Annotated[
        int | None,
        Field(
            ge=MIB,
            description="KV cache per worker, bytes; unset: what GPU memory leaves, 1 GiB on CPUs.",
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int, Field(ge=32, description="Tokens per engine step: the prefill chunk.")
    ] = 2048
    max_num_seqs: Annotated[int, Field(ge=1, description="Sequences per engine step.")] = 128
    tensor_parallel_size: Annotated[int, Field(ge=1, description="GPUs per engine.")] = 1
    enforce_eager: Annotated[bool, Field(description="No compilation and no CUDA graphs.")] = False
    trust_remote_code: Annotated[bool, Field(description="Run code from the model's repo.")] = False
    engine_args: Annotated[
        dict[str, Any], Field(description="Further vLLM engine arguments, passed as they are.")
    ] = {}
    prefill: WorkerPoolConfig = WorkerPoolConfig()
    decode: WorkerPoolConfig = WorkerPoolConfig()

    @model_validator(mode="after")
    def _a_simulated_engine_is_told_its_length(self) -> ModelConfig:
        if self.engine == "simulated" and self.max_model_len is None:
            raise ValueError("max_model_len: set it, no model tells it to a simulated engine")
        return self

    @model_validator(mode="after")
    def _engine_args_do_not_collide(self) -> ModelConfig:
        own = {
            "model",
            "kv_transfer_config",
            "kv_events_config",
            "scheduler_cls",
            "dtype",
            "max_model_len",
            "block_size",
            "max_num_batched_tokens",
            "max_num_seqs",
            "tensor_parallel_size",
            "enforce_eager",
            "trust_remote_code",
            "revision",
            "kv_cache_memory_bytes",
        }
        if taken := sorted(own & self.engine_args.keys()):
            raise ValueError(f"engine_args must not set {', '.join(taken)}: pdserve sets them")
        for name, why in _REFUSED.items():
            if name in self.engine_args:
                raise ValueError(f"engine_args.{name} is refused: {why}")
        return self
