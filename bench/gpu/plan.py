"""Which engines a session needs, on which cards, and which of them fit there at once. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu.formats import LOAD_FORMAT, OURS, PLAIN
from bench.gpu.wire import EngineSpec
from cluster.config import ModelConfig

GIB = 1 << 30
WEIGHTS_GIB = 15.0
BESIDES_GIB = 6.0
"""Context, activations of a step, CUDA graphs, communicators."""
SPARE_GIB = 2.0
NIXL_PORT = 5600


@dataclass(frozen=True)
class Setting:
    """What is to be started.

    Attributes:
        path: the model's folder.
        gpus: memory of each card in GiB; empty: the CPU.
        start_seconds: for all engines of a wave together.
        share_cards: on two cards, a prefill over both is tried beside the others, over gRPC.
        max_ctas: thread blocks of a transfer over NCCL; None: it decides.
    """

    path: str
    dtype: str
    secret: bytes
    max_model_len: int
    chunk: int
    gpus: tuple[float, ...]
    systems: tuple[str, ...]
    eager: bool = False
    share_cards: bool = False
    tensor_parallel: bool = True
    prefill_kv_gib: float = 6.0
    decode_kv_gib: float = 14.0
    start_seconds: float = 240.0
    max_ctas: int | None = None


@dataclass(frozen=True)
class Group:
    """Engines that must run at the same time."""

    name: str
    specs: tuple[EngineSpec, ...]


def groups(setting: Setting) -> list[Group]:
    """One group per system: `nccl`, `grpc`, `one`, `nixl`; the first two also hold what is needed
    for unequal sides."""
    made = []
    over_two = setting.tensor_parallel and len(setting.gpus) >= 4
    shared = setting.tensor_parallel and setting.share_cards and len(setting.gpus) == 2
    for name in setting.systems:
        match name:
            case "nccl" | "grpc":
                specs = [
                    _spec(setting, f"{name}-prefill", (0,), setting.prefill_kv_gib, name),
                    _spec(setting, f"{name}-decode", (1,), setting.decode_kv_gib, name),
                ]
                if name == "nccl" and over_two:
                    specs.append(_spec(setting, "nccl-tp2", (2, 3), setting.prefill_kv_gib, name))
                if name == "grpc" and shared:
                    specs.append(_spec(setting, "grpc-tp2", (0, 1), setting.prefill_kv_gib, name))
            case "one":
                specs = [_spec(setting, "one", (0,), setting.prefill_kv_gib)]
            case "nixl":
                specs = [
                    _spec(setting, f"nixl-{side}", (card,), setting.prefill_kv_gib, port=port)
                    for side, card, port in (
                        ("prefill", 0, NIXL_PORT),
                        ("decode", 1, NIXL_PORT + 10),
                    )
                ]
            case _:
                raise ValueError(f"there is no system {name!r}")
        made.append(Group(name, tuple(specs)))
    return made


def waves(wanted: Sequence[Group], gpus: Sequence[float]) -> list[list[Group]]:
    """Groups that are started at once, in the order given, as many as the cards hold."""
    made: list[list[Group]] = []
    taken: dict[int, float] = {}
    for group in wanted:
        more = _taken([group])
        full = any(taken.get(c, 0.0) + g > gpus[c] - SPARE_GIB for c, g in more.items())
        if not made or full:
            made.append([])
            taken = {}
        made[-1].append(group)
        taken = _taken(made[-1])
    return made


def _taken(wanted: Sequence[Group]) -> dict[int, float]:
    taken: dict[int, float] = {}
    for spec in (spec for group in wanted for spec in group.specs):
        for card in spec.gpus:
            taken[card] = taken.get(card, 0.0) + spec.gib
    return taken


def _spec(
    setting: Setting,
    name: str,
    cards: tuple[int, ...],
    kv_gib: float,
    transport: str = "",
    port: int = 0,
) -> EngineSpec:
    ranks = len(cards)
    on_gpu = bool(setting.gpus)
    args: dict[str, Any] = {
        "load_format": LOAD_FORMAT,
        "skip_tokenizer_init": True,
        "worker_extension_cls": OURS if transport else PLAIN,
    }
    if on_gpu:
        # The KV cache's size is given, so this is only what must be free at the start.
        args["gpu_memory_utilization"] = 0.1
    if not transport:
        args["disable_log_stats"] = True
    model = ModelConfig.model_validate(
        {
            "name": "bench",
            "path": setting.path,
            "dtype": setting.dtype,
            "max_model_len": setting.max_model_len,
            "max_num_batched_tokens": setting.chunk,
            "kv_cache_bytes": int(kv_gib * GIB) // ranks,
            "tensor_parallel_size": ranks,
            "enforce_eager": setting.eager,
            "engine_args": args,
        }
    )
    return EngineSpec(
        name=name,
        kind="pdserve" if transport else "nixl" if port else "vllm",
        model=model,
        gpus=cards if on_gpu else (),
        gib=(WEIGHTS_GIB + kv_gib) / ranks + BESIDES_GIB,
        transport=transport,
        max_ctas=setting.max_ctas,
        secret=setting.secret,
        port=port,
    )
