"""Where the planner's model of a worker comes from: a profile, the simulated engine's own times, or
the data sheet. Reads files; nothing else here does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from cluster.config import Config, ModelConfig
from cluster.config_models import SimulationConfig
from cluster.engine.simulated.timing import Timing
from cluster.errors import InvalidRequest, PdserveError
from cluster.planner.calibrate import calibrate
from cluster.planner.hardware import HARDWARE, Hardware, hardware
from cluster.planner.performance import DecodeCost, HandoffCost, Performance, PrefillCost
from cluster.planner.profile import Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape

NO_LIMIT = 1 << 30
ACCELERATOR = "accelerator_type:"
"""Ray's resource that names a host's GPUs."""


def speed_of(config: Config, model: ModelConfig, resources: Iterable[str]) -> Performance:
    """What one worker of the model takes.

    Args:
        resources: the names of the Ray cluster's, for what the GPUs are.

    Raises:
        PdserveError: nothing is known of the model on this hardware; says what to give.
    """
    if model.engine == "simulated":
        return _simulated(model.simulation, model.max_num_batched_tokens, model.name)
    named = config.planner.hardware
    machine = hardware(named) if named else _named_by_ray(resources)
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
    return replace(performance, kv_capacity=kv_tokens) if kv_tokens else performance


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


def _named_by_ray(resources: Iterable[str]) -> Hardware:
    kinds = {r.removeprefix(ACCELERATOR) for r in resources if r.startswith(ACCELERATOR)}
    known = {
        name for kind in kinds for name in HARDWARE if name in re.split(r"[^A-Z0-9]", kind.upper())
    }
    if kinds and len(known) != 1:
        raise PdserveError(
            f"planner.hardware: Ray names {', '.join(sorted(kinds))}: say which of "
            f"{', '.join(HARDWARE)} the workers run on"
        )
    return hardware(known.pop() if known else "CPU")
