"""Configurations with the command line's overrides."""

from __future__ import annotations

from pathlib import Path

from cluster.config import Config, RayConfig, RouterConfig
from cluster.errors import ConfigError


def with_router(
    file: Path | None,
    host: str | None,
    grpc_port: int | None,
    http_port: int | None,
    operator_port: int | None = None,
) -> Config:
    """The file's cluster, its routers where the command line wants them."""
    config = Config.load(file)
    ports = {"grpc_port": grpc_port, "http_port": http_port, "operator_port": operator_port}
    given = {"host": host, **ports}
    changes = {name: value for name, value in given.items() if value is not None}
    for name, port in ports.items():
        if port is not None and not 0 <= port <= 65535:
            raise ConfigError(f"--{name.replace('_', '-')}: must be 0 to 65535, not {port}")
    router = RouterConfig.model_validate({**config.router.model_dump(), **changes})
    if alike := router.same_ports():
        raise ConfigError(f"router: {alike} must differ")
    return config.model_copy(update={"router": router})


def with_ray(config: Config, address: str | None) -> Config:
    """On the Ray cluster at `address`, if one is given."""
    if address is None:
        return config
    ray = RayConfig.model_validate({**config.ray.model_dump(), "address": address})
    return config.model_copy(update={"ray": ray})


def for_demo(file: Path | None) -> Config:
    """On free ports and under a name of its own, so that it runs beside anything."""
    config = with_router(file, host=None, grpc_port=0, http_port=0)
    own = None if config.router.operator_port is None else 0
    router = config.router.model_copy(update={"operator_port": own})
    return config.model_copy(update={"name": f"{config.name[:27]}-demo", "router": router})
