"""A cluster from nothing to ready and back: store, Ray, controller, workers, routers."""

from __future__ import annotations

import asyncio
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil

from cluster.cli.progress import Progress
from cluster.cli.rundir import RunDir, RunState
from cluster.config import Config
from cluster.config_changes import flatten
from cluster.control.life_log import tail
from cluster.control.orphans import kill_descendants
from cluster.errors import EngineFailed, PdserveError, Unavailable
from cluster.store.client import address_of, connect
from cluster.store.embedded import EmbeddedStore
from cluster.ticket import TicketSigner

if TYPE_CHECKING:
    from cluster.control.runtime import RayRuntime
    from cluster.control.status import ClusterStatus, SlotStatus

POLL_SECONDS = 0.25
CALL_SECONDS = 15.0
CONNECT_SECONDS = 20.0


class Cluster:
    """A cluster that this process runs. Start it once, stop it always."""

    def __init__(self, config: Config, rundir: RunDir, progress: Progress) -> None:
        self._config = config
        self._rundir = rundir
        self._progress = progress
        self._store: EmbeddedStore | None = None
        self._ray: RayRuntime | None = None
        self._ray_runs = False
        self._controller: Any = None
        self._token = ""
        self._routed: tuple[str, str, str] | None = None

    @property
    def config(self) -> Config:
        """As last reloaded."""
        return self._config

    def show_on(self, progress: Progress) -> None:
        """Further progress goes to `progress`."""
        self._progress = progress

    async def start(self) -> ClusterStatus:
        """Brings everything up; returns when every worker and router is ready.

        Raises:
            PdserveError: what kept it from coming up, with the cause from the part's own log.
        """
        self._publish("starting")
        self._rundir.write_config(flatten(self._config))
        url = await self._start_store()
        runtime = await self._start_ray()
        from cluster.control.launch import Launch

        secret = self._config.secret
        key = secret.get_secret_value().encode() if secret else secrets.token_bytes(32)
        self._token = TicketSigner(key).call_token()
        self._rundir.write_operator_token(self._token)
        launch = Launch(
            config=self._config,
            secret=key,
            store_url=url,
            log_dir=self._rundir.logs if runtime.embedded else None,
            embedded=runtime.embedded,
            omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        )
        self._controller = await runtime.start_controller(launch)
        status = await self._until_ready()
        router = next(slot for slot in status.slots if slot.kind == "router")
        await self._until_connected(router.operator_address)
        self._publish("ready", _addresses(router))
        return status

    async def status(self) -> ClusterStatus:
        """The controller's view. Raises Unavailable while it does not answer."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                status: ClusterStatus = await self._controller.status.remote()
        except Exception as error:
            raise Unavailable(
                f"the controller does not answer ({type(error).__name__}): "
                f"see {self._rundir.logs / 'controller.log'}"
            ) from error
        if status.needs_config:
            await self._tell_config(self._config)
        for slot in status.slots:
            if slot.state != "empty":
                on = f"on {slot.host}" if slot.host else ""
                self._progress.show(slot.slot_id, slot.state, slot.detail or on)
            elif status.stopping:
                self._progress.show(slot.slot_id, "gone")
        self._follow_router(status)
        return status

    def _follow_router(self, status: ClusterStatus) -> None:
        """A router's next life may have other ports: the commands here must find it."""
        serving = [s for s in status.slots if s.kind == "router" and s.state == "ready"]
        known = [_addresses(slot) for slot in serving]
        if self._routed is not None and known and self._routed not in known:
            self._publish_if_possible("ready", known[0])

    async def reload(self, config: Config) -> list[str]:
        """Hands another configuration to the controller; what a router could not take over. Raises
        Unavailable if the controller is not there."""
        complaints = await self._tell_config(config)
        self._config = config
        try:
            self._rundir.write_config(flatten(config))
        except Unavailable as error:
            complaints.append(f"{error}; `pdserve config diff` compares with what was before")
        return complaints

    async def _tell_config(self, config: Config) -> list[str]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                complaints: list[str] = await self._controller.reload.remote(config)
        except Exception as error:
            raise Unavailable(f"the controller does not answer ({type(error).__name__})") from error
        return complaints

    async def stop(self, drain_seconds: float) -> list[str]:
        """Routers drain, workers end, then Ray and the store; returns the processes that had to be
        killed after all of them were gone."""
        self._publish_if_possible("stopping")
        if self._controller is not None:
            await self._drain(drain_seconds)
        if self._ray is not None and self._ray_runs:
            self._progress.show("ray", "stopping")
            with suppress(Exception):
                async with asyncio.timeout(CALL_SECONDS):
                    await self._ray.stop()
            self._progress.show("ray", "gone")
        if self._store is not None:
            await asyncio.to_thread(self._store.stop)
            self._progress.show("store", "gone")
        left = await asyncio.to_thread(kill_descendants)
        if self._ray is not None:
            self._ray.remove_files()
        self._rundir.clear()
        return left

    async def _start_store(self) -> str:
        config = self._config.store
        self._progress.show("store", "starting")
        if config.url is None:
            self._store = EmbeddedStore.start(self._rundir.path)
            url, detail = self._store.url, "embedded Valkey"
        else:
            url = config.url.get_secret_value()
            detail = address_of(url)
        client = await connect(url, config.connect_timeout_seconds)
        await client.aclose()
        self._rundir.write_store_url(url)
        self._progress.show("store", "ready", detail)
        return url

    async def _start_ray(self) -> RayRuntime:
        self._progress.show("ray", "starting")
        from cluster.control.runtime import RayRuntime

        runtime = RayRuntime(self._config, self._rundir.path)
        self._ray = runtime
        await runtime.start()
        self._ray_runs = True
        self._progress.show("ray", "ready", self._config.ray.address or "embedded")
        return runtime

    async def _until_ready(self) -> ClusterStatus:
        limit = self._config.lifecycle.start_timeout_seconds
        try:
            async with asyncio.timeout(limit):
                while True:
                    status = await self._status_at_last()
                    if status.ready:
                        return status
                    # Nobody wants to watch a first start fail three times over.
                    if failed := [slot for slot in status.slots if slot.failures]:
                        raise self._why(failed[0])
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            status = await self.status()
            waiting = [
                f"{s.slot_id} ({s.detail or s.state})" for s in status.slots if s.state != "ready"
            ]
            raise Unavailable(
                f"not ready within lifecycle.start_timeout_seconds ({limit:g} s): "
                + ", ".join(waiting)
            ) from None

    async def _status_at_last(self) -> ClusterStatus:
        """As `status`, of a controller whose process may take long to start."""
        while True:
            try:
                return await self.status()
            except Unavailable as error:
                if not isinstance(error.__cause__, TimeoutError):
                    raise

    async def _until_connected(self, address: str) -> None:
        """A request would now be served: the router has a stream to every worker."""
        from cluster.cli.access import channel
        from cluster.cli.calls import cluster_view

        if self._config.router.tls is not None:
            return  # It has no certificate of its own to ask with; the registry's word must do.
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS), channel(address, self._token) as to:
                while True:
                    view = await cluster_view(to)
                    if view.workers and all(worker.connected for worker in view.workers):
                        return
                    await asyncio.sleep(POLL_SECONDS)
        raise Unavailable(
            f"the router at {address} has no stream to its workers after {CONNECT_SECONDS:g} s: "
            f"see {self._rundir.logs / 'router-0.log'}"
        )

    def _why(self, slot: SlotStatus) -> PdserveError:
        log = self._rundir.logs / f"{slot.slot_id}.log"
        last = "".join(f"\n  {line}" for line in slot.log_tail or tail(log))
        where = f"its log on {slot.host}" if slot.host else str(log)
        ends = f"\n{where} ends with:{last}" if last else ""
        return EngineFailed(f"{slot.slot_id} does not start: {slot.detail}{ends}")

    async def _drain(self, drain_seconds: float) -> None:
        shutdown = asyncio.ensure_future(self._controller.shutdown.remote(drain_seconds))
        with suppress(Exception):
            async with asyncio.timeout(drain_seconds + 3 * CALL_SECONDS):
                while not shutdown.done():
                    await asyncio.wait([shutdown], timeout=POLL_SECONDS)
                    if not shutdown.done():
                        await self.status()
                status = await self.status()
                for slot in status.slots:
                    self._progress.show(slot.slot_id, "gone")
        shutdown.cancel()

    def _publish_if_possible(self, state: str, routed: tuple[str, str, str] | None = None) -> None:
        """A full disk is no reason to end a cluster that serves, or to end it without a drain."""
        try:
            self._publish(state, routed)
        except Unavailable as error:
            self._progress.show("runtime directory", "failed", str(error))

    def _publish(self, state: str, routed: tuple[str, str, str] | None = None) -> None:
        self._routed = routed
        pid = os.getppid()  # the guardian: it goes last
        started = psutil.Process(pid).create_time()
        self._rundir.write(RunState(self._config.name, pid, started, state, *(routed or ())))


def _addresses(router: SlotStatus) -> tuple[str, str, str]:
    return router.grpc_address, router.http_address, router.operator_address
