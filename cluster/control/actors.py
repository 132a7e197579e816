"""The Ray actors around a worker and a router: thin, and free of engine imports until `run`.

An actor is one life. `run()` lasts as long as the life: it returns None when the body was stopped
and the Failure when it failed; the controller holds its reference and so learns of either, and of
the process's death, in one place.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.config import Config
from cluster.control import interfaces
from cluster.control.arrival import Landing, check_clock, check_host, land
from cluster.control.launch import Launch
from cluster.control.life_log import redirect_output, tail, with_cause
from cluster.control.orphans import become_subreaper, kill_descendants
from cluster.control.reconcile import Slot
from cluster.errors import ConfigError, EngineFailed, PdserveError, Unavailable
from cluster.obs.garbage import keep_what_is_loaded
from cluster.store.client import connect
from cluster.store.clock import ahead_seconds

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Where:
    """Where a life is.

    Attributes:
        host: the address of its Ray node; empty in an embedded cluster.
    """

    host: str
    pid: int
    log: Path


@dataclass(frozen=True)
class Failure:
    """Why a life ended by itself: `permanent` if another try cannot end otherwise.

    Attributes:
        log_tail: the last lines of its log; none where the reason says it all.
    """

    reason: str
    permanent: bool
    log_tail: tuple[str, ...]


class _LifeActor(ABC):
    def __init__(self, launch: Launch, slot: Slot, incarnation: str) -> None:
        self._log = log_path(launch, slot.slot_id)
        self._former = redirect_output(self._log)
        become_subreaper()
        if launch.omp_num_threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = launch.omp_num_threads
        self._launch = launch
        self._slot = slot
        self._incarnation = incarnation
        self._body: Any = None
        self._stopping = False
        self._stopped = asyncio.Event()

    async def where(self) -> Where:
        """The host, the process and its log."""
        return Where("" if self._launch.embedded else _node_address(), os.getpid(), self._log)

    async def run(self) -> Failure | None:
        """Starts the body and serves until it is stopped (None) or fails."""
        _setup_logging()
        try:
            await self._serve(await self._land())
        except Exception as error:
            if isinstance(error, PdserveError):
                print(error, flush=True)
            else:
                traceback.print_exc()
            return _failure(error, self._log, self._former)
        return None

    async def reload(self, config: Config) -> None:
        """Passes on what may change while the body serves. Raises ConfigError as the body does."""
        if self._body is not None:
            self._body.reload(config)

    async def set_role(self, role: str, drain_seconds: float) -> int:
        """As `WorkerHost.set_role`.

        Raises:
            Unavailable: it is not up yet.
        """
        if self._body is None:
            raise Unavailable("the worker is not up yet")
        return int(await self._body.set_role(role, drain_seconds))

    async def stop(self, drain_seconds: float) -> None:
        """Drains and ends the body and everything it started."""
        self._stopping = True
        try:
            if self._body is not None:
                await self._body.stop(drain_seconds)
            await asyncio.to_thread(kill_descendants)
        finally:
            self._stopped.set()

    @abstractmethod
    async def _serve(self, landing: Landing) -> None: ...

    async def _land(self) -> Landing:
        """Checks this host, unless it is the one on which `pdserve up` has done so already."""
        launch, slot = self._launch, self._slot
        own = LOOPBACK if launch.embedded else _node_address()
        if not launch.embedded:
            check_host(launch.config, slot, own, len(ray.get_gpu_ids()))
            client = await connect(launch.store_url, launch.config.store.connect_timeout_seconds)
            try:
                check_clock(await ahead_seconds(client), f"on host {own}")
            finally:
                await client.aclose()
        return land(launch.config, slot, own, interfaces.here())


class WorkerActor(_LifeActor):
    """One life of a worker."""

    async def _serve(self, landing: Landing) -> None:
        launch, slot = self._launch, self._slot
        self._body = _load(launch.worker_body)(
            config=landing.config,
            model_name=slot.model,
            worker_id=slot.slot_id,
            incarnation=self._incarnation,
            role=slot.role,
            secret=launch.secret,
            store_url=launch.store_url,
            bind_host=landing.host,
        )
        await self._body.start()
        keep_what_is_loaded()
        await self._body.run_until_stopped()
        if self._stopping:  # the process is killed when this returns
            await self._stopped.wait()


class RouterActor(_LifeActor):
    """One life of a router."""

    async def demand(self, mark: tuple[int, int] | None) -> Any:
        """As `RouterServer.demand`; None while it is not up."""
        return self._body.demand(mark) if self._body is not None else None

    async def _serve(self, landing: Landing) -> None:
        launch = self._launch
        self._body = _load(launch.router_body)(
            config=landing.config,
            router_id=self._slot.slot_id,
            incarnation=self._incarnation,
            secret=launch.secret,
            store_url=launch.store_url,
            advertised_host=landing.advertised_host,
        )
        await self._body.start()
        keep_what_is_loaded()
        waits = {
            asyncio.create_task(self._stopped.wait()),
            asyncio.create_task(self._body.broken.wait()),
        }
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._stopping:  # the process is killed when this returns
            await self._stopped.wait()
        else:
            raise EngineFailed("the router broke: its log tells why")


def log_path(launch: Launch, name: str) -> Path:
    """The log of the slot or part called `name`, on this host."""
    if launch.log_dir is not None:
        return launch.log_dir / f"{name}.log"
    context = ray.get_runtime_context()
    folder = Path(context.get_temp_dir(), context.get_session_name(), "logs")
    return folder / f"pdserve-{launch.config.name}-{name}.log"


def _failure(error: Exception, log: Path, former: int) -> Failure:
    permanent = isinstance(error, ConfigError | ImportError)
    if isinstance(error, PdserveError):
        reason = with_cause(str(error), log, former)
    else:
        reason = f"{type(error).__name__}: {first_line(error)}"
    return Failure(reason, permanent, () if isinstance(error, ConfigError) else tuple(tail(log)))


def first_line(error: BaseException) -> str:
    """Of what the error says; the last one where the first says next to nothing."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if len(lines[0]) > 8 else lines[-1]


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())


def _setup_logging() -> None:
    from cluster.obs import logs

    logs.setup()
