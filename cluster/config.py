"""The one configuration: a YAML file, overridden by PDSERVE_… environment variables.

`Config.load(path)` reads it; an unknown or impossible field raises ConfigError with the field's
path, what was meant and how to mend it. Environment: `PDSERVE_ROUTER__GRPC_PORT=6000` sets
`router.grpc_port`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cluster.config_clients import (
    BatchConfig,
    ClassesConfig,
    CredentialsConfig,
    ResumeConfig,
    TenantConfig,
    check_callers,
)
from cluster.config_environment import check_environment, unreadable
from cluster.config_errors import explain
from cluster.config_files import default_cluster, read_yaml, with_secret_files
from cluster.config_models import MIB, ModelConfig, PoolConfig, Section, WorkerPoolConfig
from cluster.config_planner import PlannerConfig
from cluster.config_servers import RouterConfig, WorkerConfig
from cluster.errors import ConfigError
from cluster.ports import ANY, Ports

__all__ = [
    "Config",
    "HandoffConfig",
    "LifecycleConfig",
    "ModelConfig",
    "PoolConfig",
    "RouterConfig",
    "Section",
    "WorkerPoolConfig",
]

Role = Literal["prefill", "decode", "both"]


class StoreConfig(Section):
    """Where the registry and the journal live."""

    url: Annotated[
        SecretStr | None,
        Field(description="redis:// or rediss:// URL; unset: an embedded Valkey."),
    ] = None
    connect_timeout_seconds: Annotated[
        float, Field(gt=0, description="For a connection, and for a command's answer.")
    ] = 5.0
    lease_seconds: Annotated[
        float, Field(ge=1, description="A worker that does not renew for so long is dropped.")
    ] = 10.0

    @model_validator(mode="after")
    def _scheme(self) -> StoreConfig:
        if self.url is not None:
            scheme = urlsplit(self.url.get_secret_value()).scheme
            if scheme not in ("redis", "rediss", "unix"):
                raise ValueError(
                    f"url must start with redis://, rediss:// or unix://, not {scheme!r}"
                )
        return self


class RayConfig(Section):
    """The Ray cluster that places the processes."""

    address: Annotated[
        str | None, Field(description="Of a running Ray cluster; unset: an embedded one.")
    ] = None
    namespace: Annotated[str, Field(description="Of its actors in the Ray cluster.")] = "pdserve"


class HandoffConfig(Section):
    """The KV transfer between workers."""

    transport: Annotated[
        Literal["auto", "grpc", "nccl"],
        Field(description="How KV moves; auto: nccl between GPUs that it can join, else grpc."),
    ] = "auto"
    host: Annotated[
        str | None,
        Field(
            description="Interface of the transfer port: a name, an address or a network such as"
            " 10.0.0.0/8; unset: the worker's own."
        ),
    ] = None
    ports: Annotated[
        Ports,
        Field(description="Transfer port of an engine rank, a range where hosts carry several."),
    ] = ANY
    ticket_seconds: Annotated[
        float,
        Field(gt=0, le=3600, description="Life of a ticket and lease of its blocks."),
    ] = 60.0
    max_message_bytes: Annotated[
        int, Field(ge=64 << 10, le=64 * MIB, description="Largest frame; holds a block at least.")
    ] = 16 * MIB
    max_streams: Annotated[int, Field(ge=1, description="Handoffs received at once.")] = 256
    max_ahead_bytes: Annotated[
        int,
        Field(ge=0, description="KV that prefill may pin, per rank, before decode has room."),
    ] = 4 << 30
    link_checksums: Annotated[
        int, Field(ge=0, description="Every how many payloads over nccl are checked; 0: none.")
    ] = 1
    link_seconds: Annotated[
        float,
        Field(gt=0, le=600, description="A link over nccl that stands still for so long is dead."),
    ] = 10.0
    link_max_ctas: Annotated[
        int | None,
        Field(
            ge=1,
            le=64,
            description="Thread blocks that a transfer over nccl may take from the GPU's own work"
            " where it needs kernels; unset: NCCL decides.",
        ),
    ] = None
    link_bytes: Annotated[
        int,
        Field(
            ge=16 * MIB,
            description="GPU memory of a link over nccl, at either end, where there is so much: at"
            " most. A GPU has at most 16 links each way.",
        ),
    ] = 1 << 30


class TargetsConfig(Section):
    """What the cluster is to reach."""

    ttft_seconds: Annotated[float, Field(gt=0, description="Time to first token.")] = 2.0
    tpot_seconds: Annotated[float, Field(gt=0, description="Time per output token.")] = 0.1


class PlacementConfig(Section):
    """Where requests run."""

    disaggregate: Annotated[
        Literal["auto", "always", "never"],
        Field(
            description="Prefill and decode on two workers: where that is predicted to be better, "
            "or always, or never."
        ),
    ] = "auto"
    prefix_blocks: Annotated[
        int,
        Field(ge=1000, description="KV blocks of all workers that a router keeps track of."),
    ] = 1_000_000


class LifecycleConfig(Section):
    """How long starting and stopping may take."""

    start_timeout_seconds: Annotated[float, Field(gt=0, description="For all workers.")] = 900.0
    drain_timeout_seconds: Annotated[
        float, Field(ge=0, description="Running requests get so long at a stop.")
    ] = 30.0


class Config(BaseSettings):
    """A whole cluster."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="PDSERVE_", env_nested_delimiter="__"
    )

    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$", description="Of the cluster; one a host."),
    ] = "pdserve"
    models: Annotated[
        list[ModelConfig],
        Field(min_length=1, description="Each with its own pools; requests name the one."),
    ]
    router: RouterConfig = RouterConfig()
    worker: WorkerConfig = WorkerConfig()
    store: StoreConfig = StoreConfig()
    ray: RayConfig = RayConfig()
    handoff: HandoffConfig = HandoffConfig()
    targets: TargetsConfig = TargetsConfig()
    classes: ClassesConfig = ClassesConfig()
    resume: ResumeConfig = ResumeConfig()
    batch: BatchConfig = BatchConfig()
    tenants: Annotated[
        list[TenantConfig], Field(description="None: everyone is the one tenant `default`.")
    ] = []
    operator: Annotated[
        CredentialsConfig, Field(description="Of the Operator API; needed once there are tenants.")
    ] = CredentialsConfig()
    placement: PlacementConfig = PlacementConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    planner: PlannerConfig = PlannerConfig()
    secret: Annotated[
        SecretStr | None,
        Field(description="Signs tickets and internal calls; unset: drawn at every start."),
    ] = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings

    @model_validator(mode="after")
    def _unique_models(self) -> Config:
        names = [m.name for m in self.models]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"models: {', '.join(twice)} is named twice")
        slots = [name.replace("/", "-") for name in names]  # as their workers are called
        if alike := sorted(name for name in names if slots.count(name.replace("/", "-")) > 1):
            raise ValueError(f"models: {', '.join(alike)} differ in / and - only: rename one")
        if ports := self.router.same_ports():
            raise ValueError(f"router: {ports} must differ")
        if not self.router.pool.replicas:
            raise ValueError("router.pool.replicas: needs one at least")
        check_callers(self.tenants, self.operator, self.router.tls)
        if self.secret is not None and len(self.secret.get_secret_value()) < 16:
            raise ValueError("secret: needs at least 16 characters")
        return self

    @classmethod
    def load(cls, path: Path | None) -> Config:
        """Reads `path`, or the shipped demo cluster if it is None.

        Raises:
            ConfigError: the file cannot be read, or a field, there or in the environment, is
                unknown or impossible.
        """
        check_environment(cls, os.environ)
        raw = with_secret_files(read_yaml(path) if path else default_cluster())
        try:
            config = cls(**raw)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, path)) from None
        except SettingsError as error:
            raise unreadable(error) from None
        return config if path is None else config._relative_to(path.resolve().parent)

    def _relative_to(self, base: Path) -> Config:
        """Paths are relative to the file that names them."""
        models = []
        for model in self.models:
            local = base / model.path
            models.append(
                model.model_copy(update={"path": str(local)}) if local.is_dir() else model
            )
        tls = self.router.tls
        router = self.router.model_copy(update={"tls": tls and tls.beside(base)})
        tenants = [tenant.beside(base) for tenant in self.tenants]
        operator = self.operator.beside(base)
        clients = {"tenants": tenants, "operator": operator, "router": router}
        planner = self.planner.beside(base)
        return self.model_copy(update={**clients, "models": models, "planner": planner})

    def model(self, name: str) -> ModelConfig:
        """The model called `name`. Raises KeyError."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)
