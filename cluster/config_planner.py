"""The `planner` part of the configuration: whether the cluster scales itself, and within what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config_models import Section

PlannerMode = Literal["off", "recommend", "act"]


class NodeBudgetConfig(Section):
    """How much of one type of node the planner may use."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="In decisions, metrics."),
    ]
    gpus: Annotated[
        int,
        Field(ge=0, le=65536, description="In all; for engines on CPUs, so many workers."),
    ]
    labels: Annotated[
        dict[str, str],
        Field(description="Of the hosts of this type, as in a pool's `labels`; added to them."),
    ] = {}


class PlannerConfig(Section):
    """What decides how many workers each pool has."""

    mode: Annotated[
        PlannerMode,
        Field(
            description="off; recommend: it decides and says why, and changes nothing; act: it "
            "also changes roles, adds and removes workers, from the pools' `replicas` on."
        ),
    ] = "recommend"
    interval_seconds: Annotated[float, Field(ge=0.5, description="Between two decisions.")] = 5.0
    budget: Annotated[
        list[NodeBudgetConfig],
        Field(description="By node type, in order of preference; none: what `replicas` take."),
    ] = []
    min_per_pool: Annotated[
        int, Field(ge=1, le=1024, description="Workers that a pool in use keeps.")
    ] = 1
    max_step: Annotated[
        int, Field(ge=1, le=1024, description="Workers added, turned or removed in one decision.")
    ] = 8
    cold_start_seconds: Annotated[
        float, Field(ge=1, description="Until an added worker serves.")
    ] = 60.0
    down_after_seconds: Annotated[
        float, Field(ge=0, description="A pool was too large for so long before it shrinks.")
    ] = 180.0
    flip_drain_seconds: Annotated[
        float,
        Field(
            ge=0,
            description="A worker that changes its role waits so long for what runs on it; what "
            "takes longer goes on beside its new work.",
        ),
    ] = 10.0
    share: Annotated[
        float, Field(gt=0, lt=1, description="Of a class's requests, that are to meet its targets.")
    ] = 0.9
    season_seconds: Annotated[
        float | None, Field(gt=0, description="Load repeats itself after so long, such as 86400.")
    ] = None
    hardware: Annotated[
        str | None,
        Field(description="A100, H100, H200, B200, L40S or CPU; unset: as Ray names the GPUs."),
    ] = None
    profile: Annotated[
        Path | None,
        Field(description="What `pdserve profile` measured; unset: the data sheet's roofline."),
    ] = None

    @model_validator(mode="after")
    def _unique_types(self) -> PlannerConfig:
        names = [each.name for each in self.budget]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"budget: {', '.join(twice)} is named twice")
        return self

    def beside(self, folder: Path) -> PlannerConfig:
        """Its file relative to the folder of the configuration."""
        return self.model_copy(update={"profile": self.profile and folder / self.profile})
