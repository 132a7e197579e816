"""Where the planner's model of a worker comes from: a profile, the simulated engine's own times, or
the data sheet. Reads files; nothing else here does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.config import Config, ModelConfig
from cluster.config_models import SimulationConfig, WorkerPoolConfig
from cluster.engine.simulated.timing import Timing
from cluster.errors import InvalidRequest, PdserveError
from cluster.planner.calibrate import calibrate
from cluster.planner.hardware import HARDWARE, Hardware, hardware
from cluster.planner.performance import DecodeCost, HandoffCost, Performance, PrefillCost, across
from cluster.planner.profile import Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape

NO_LIMIT = 1 << 30
ACCELERATOR = "accelerator_type:"
"""Ray's resource that names a host's GPUs."""
ACCELERATOR_LABEL = "ray.io/accelerator-type"


def speed_of(config: Config, model: ModelConfig, resources: Iterable[str]) -> Performance:
    """What a worker of either pool takes; they differ where the pools' labels name other GPUs.

    Args:
        resources: the names of the Ray cluster's, for what the GPUs are.

    Raises:
        PdserveError: nothing is known of the model on this hardware; says what to give.
    """
    if model.engine == "simulated":
        return _simulated(model.simulation, model.max_num_batched_tokens, model.name)
    kinds = [hardware_of(config, pool, resources) for pool in (model.prefill, model.decode)]
    prefill, decode = (_worker(config, model, kind, kinds) for kind in kinds)
    return across(prefill, decode)


def hardware_of(config: Config, pool: WorkerPoolConfig, resources: Iterable[str]) -> Hardware:
    """What the pool's labels name, else `planner.hardware`, else Ray.

    Raises:
        PdserveError: none of them does.
    """
    if named := _known(pool.labels.get(ACCELERATOR_LABEL, "")):
        return hardware(named)
    if config.planner.hardware:
        return hardware(config.planner.hardware)
    return _named_by_ray(resources)


def _worker(
    config: Config, model: ModelConfig, machine: Hardware, kinds: Sequence[Hardware]
) -> Performance:
    """By the profile, if it is of this hardware; a profile of none of the kinds is refused."""
    try:
        shape = load_shape(model.path)
    except InvalidRequest as error:
        raise InvalidRequest(
            f"models.{model.name}.path",
            f"the planner cannot tell how large it is ({error.message}): use a local directory",
        ) from error
    start = roofline(shape, machine, model.tensor_parallel_size)
    if config.planner.profile is None:
        return start
    profile = read_profile(config.planner.profile, "planner.profile")
    if profile.hardware.upper() in {k.name for k in kinds} - {machine.name}:
        return start
    profile.check(shape.name, machine.name, model.tensor_parallel_size)
    return calibrate(start, profile).performance


def read_profile(path: Path, field: str) -> Profile:
    """Raises InvalidRequest: it cannot be read, or is none."""
    try:
        return Profile.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(field, f"{path} cannot be read: {error}") from error


def with_capacity(performance: Performance, kv_tokens: int) -> Performance:
    """With the KV cache that the workers have registered."""
    if not kv_tokens:
        return performance
    whole = performance.whole and with_capacity(performance.whole, kv_tokens)
    return replace(performance, kv_capacity=kv_tokens, whole=whole)


def _simulated(simulation: SimulationConfig, chunk: int, name: str) -> Performance:
    """The engine's own timing model. A prompt takes ⌈tokens/chunk⌉ steps, which is half a step more
    than tokens/chunk on average, and one at least."""
    timing = Timing.of(simulation)
    decode = DecodeCost(timing.base, timing.d, timing.c)
    return Performance(
        PrefillCost(timing.base / 2, timing.a + timing.base / chunk, timing.b / 2, timing.base),
        decode,
        decode,
        NO_LIMIT,
        HandoffCost(timing.latency, timing.bandwidth),
        timing.bytes_per_token,
        simulation.num_blocks * 32,
        label=f"{name}, simulated",
    )


def _known(text: str) -> str:
    """The hardware that a name such as NVIDIA-H100-80GB-HBM3 tells of; empty if none."""
    words = re.split(r"[^A-Z0-9]", text.upper())
    return next((name for name in HARDWARE if name in words), "")


def _named_by_ray(resources: Iterable[str]) -> Hardware:
    kinds = {r.removeprefix(ACCELERATOR) for r in resources if r.startswith(ACCELERATOR)}
    known = {name for kind in kinds if (name := _known(kind))}
    if kinds and len(known) != 1:
        raise PdserveError(
            f"planner.hardware: Ray names {', '.join(sorted(kinds))}: say which of "
            f"{', '.join(HARDWARE)} the workers run on"
        )
    return hardware(known.pop() if known else "CPU")
