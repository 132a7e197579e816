"""The Ray actors around a worker and a router: thin, and free of engine imports until `run`.

An actor is one life. `run()` lasts as long as the life: it returns when the body was stopped and
raises when it failed; the controller holds its reference and so learns of either, and of the
process's death, in one place.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.control.orphans import become_subreaper, kill_descendants
from cluster.control.reconcile import Slot
from cluster.errors import EngineFailed

WORKER_BODY = "cluster.control.compose:worker_host"
ROUTER_BODY = "router.server:RouterServer"


@dataclass(frozen=True)
class Launch:
    """What every life of a cluster is given. Holds secrets: never print or log it.

    Attributes:
        log_dir: on the actor's host; `<slot>.log` in it takes stdout and stderr.
        bind_host: interface of workers; empty: the address of the Ray node.
        omp_num_threads: the user's own setting, which Ray overwrites in actors.
        worker_body, router_body: `module:factory`, imported in the actor.
    """

    config: Config
    secret: bytes
    store_url: str
    log_dir: Path
    bind_host: str = "127.0.0.1"
    omp_num_threads: str | None = None
    worker_body: str = WORKER_BODY
    router_body: str = ROUTER_BODY

    def __repr__(self) -> str:
        return f"Launch({self.config.name})"


class _LifeActor:
    def __init__(self, launch: Launch, slot: Slot, incarnation: str) -> None:
        redirect_output(launch.log_dir / f"{slot.slot_id}.log")
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

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    async def stop(self, drain_seconds: float) -> None:
        """Drains and ends the body and everything it started."""
        self._stopping = True
        try:
            if self._body is not None:
                await self._body.stop(drain_seconds)
            await asyncio.to_thread(kill_descendants)
        finally:
            self._stopped.set()


class WorkerActor(_LifeActor):
    """One life of a worker."""

    async def run(self) -> None:
        """Starts the worker and serves until it is stopped or fails."""
        launch, slot = self._launch, self._slot
        _setup_logging()
        self._body = _load(launch.worker_body)(
            config=launch.config,
            model_name=slot.model,
            worker_id=slot.slot_id,
            incarnation=self._incarnation,
            role=slot.role,
            secret=launch.secret,
            store_url=launch.store_url,
            bind_host=launch.bind_host or _node_address(),
        )
        await self._body.start()
        await self._body.run_until_stopped()
        if self._stopping:  # the process is killed when this returns
            await self._stopped.wait()


class RouterActor(_LifeActor):
    """One life of a router."""

    async def run(self) -> None:
        """Starts the router and serves until it is stopped."""
        launch = self._launch
        _setup_logging()
        self._body = _load(launch.router_body)(
            config=launch.config,
            router_id=self._slot.slot_id,
            incarnation=self._incarnation,
            secret=launch.secret,
            store_url=launch.store_url,
        )
        await self._body.start()
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


def redirect_output(path: Path) -> None:
    """Sends this process's stdout and stderr, and its future children's, to `path`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _node_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _setup_logging() -> None:
    from cluster.obs import logs

    logs.setup()
