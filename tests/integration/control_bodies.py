"""Bodies without engines for the control plane's actors."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from cluster.store.client import connect
from cluster.store.records import RouterRecord, WorkerRecord
from cluster.store.registry import Registry


class Worker:
    """Registers, holds a child process, serves nothing."""

    def __init__(self, **given: Any) -> None:
        self._given = given
        self._stopped = asyncio.Event()

    async def start(self) -> None:
        given = self._given
        self._registry = Registry(await connect(given["store_url"], 2.0), given["config"].name)
        self._record = WorkerRecord(
            given["worker_id"],
            given["incarnation"],
            given["model_name"],
            given["role"],
            "ready",
            pid=os.getpid(),
            started_at=time.time(),
        )
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "import time; time.sleep(300)"
        )
        await self._registry.put_worker(self._record, 300)

    async def run_until_stopped(self) -> None:
        await self._stopped.wait()

    async def stop(self, drain_seconds: float) -> None:
        self._stopped.set()
        await self._registry.remove_worker(self._record.worker_id, self._record.incarnation)


class Router:
    """Registers, serves nothing."""

    def __init__(self, **given: Any) -> None:
        self._given = given
        self.broken = asyncio.Event()

    async def start(self) -> None:
        given = self._given
        self._registry = Registry(await connect(given["store_url"], 2.0), given["config"].name)
        self._record = RouterRecord(
            given["router_id"], given["incarnation"], "h:1", "h:2", started_at=time.time()
        )
        await self._registry.put_router(self._record, 300)

    def reload(self, config: Any) -> None:
        pass

    async def stop(self, drain_seconds: float) -> None:
        await self._registry.remove_router(self._record.router_id, self._record.incarnation)
