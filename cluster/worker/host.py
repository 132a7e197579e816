"""A worker: an engine, its faces, its gRPC server and its place in the registry."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import prometheus_client
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from cluster.config import Config, ModelConfig
from cluster.engine.protocol import Engine, EngineInfo
from cluster.errors import ConfigError, EngineFailed, PdserveError, Unavailable
from cluster.ports import take
from cluster.rpc.limits import Limits
from cluster.rpc.server import RpcServer
from cluster.store.client import connect
from cluster.store.records import WorkerRecord
from cluster.store.registry import Registry
from cluster.ticket import TicketSigner
from cluster.worker.holdings import HoldingsMetrics
from cluster.worker.membership import Membership
from cluster.worker.sequence import Face, Identity, Stage
from cluster.worker.servicer import WorkerServicer
from cluster.worker.warm_up import warm_up
from pdserve.v1 import worker_pb2_grpc

log = logging.getLogger(__name__)

LIMITS = Limits(
    message_bytes=64 << 20,  # a StartSequence with the longest prompt
    calls=1000,
    window_bytes=4 << 20,
    keepalive_seconds=20.0,
)

Faces = dict[Stage, Face]
MakeEngine = Callable[[ModelConfig, str, str, bytes, str], Engine]
"""Of model, worker id, incarnation, secret and host."""
MakeFaces = Callable[[Engine, Identity, TicketSigner, Registry], Callable[[str], Faces]]
"""The faces that a role shows."""

SETTLE_SECONDS = 0.3
"""After an announcement: within this the routers have heard it, and send nothing of the former kind
any more. A router that has not is refused, and places its sequence elsewhere."""


class WorkerHost:
    """One life of one worker.

    Args:
        model_name: of `config.models`.
        incarnation: drawn for this life.
        role: prefill, decode or both.
        bind_host: interface of its servers.
        make_engine, make_faces: what stands behind the servers; `cluster.control` puts vLLM and the
            two workers' faces there.
    """

    def __init__(
        self,
        config: Config,
        model_name: str,
        worker_id: str,
        incarnation: str,
        role: str,
        secret: bytes,
        store_url: str,
        bind_host: str,
        make_engine: MakeEngine,
        make_faces: MakeFaces,
    ) -> None:
        self._config = config
        self._model = config.model(model_name)
        self._secret = secret
        self._store_url = store_url
        self._host = bind_host
        self._make_engine = make_engine
        self._make_faces = make_faces
        self._record = WorkerRecord(
            worker_id=worker_id,
            incarnation=incarnation,
            model=model_name,
            role=role,
            state="starting",
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=time.time(),
            detail="starting",
        )
        self._engine: Engine | None = None
        self._faces: Callable[[str], Faces] = lambda _: {}
        self._membership: Membership | None = None
        self._server: RpcServer | None = None
        self._servicer: WorkerServicer | None = None
        self._holdings: HoldingsMetrics | None = None
        self._stopped = asyncio.Event()
        self._stopping = False

    @property
    def record(self) -> WorkerRecord:
        """As last announced."""
        return self._record

    async def start(self) -> None:
        """Comes up: registered as starting, then ready.

        Raises:
            PdserveError: what kept it from coming up; the registry says it too.
        """
        store = await connect(self._store_url, self._config.store.connect_timeout_seconds)
        registry = Registry(store, self._config.name)
        self._membership = Membership(registry, self._config.store.lease_seconds)
        await self._announce("starting", "loading the model")
        try:
            await self._open(registry)
        except PdserveError as error:
            await self._announce("failed", str(error))
            raise
        await self._announce("ready", "")

    async def _open(self, registry: Registry) -> None:
        record = self._record
        self._engine = self._make_engine(
            self._model, record.worker_id, record.incarnation, self._secret, self._host
        )
        info = await self._engine.start()
        self._refuse_unservable(info)
        if not info.simulated:
            await self._announce("starting", "warming up")
            await warm_up(self._engine, info)
        me = Identity(record.worker_id, record.incarnation, info.layout)
        signer = TicketSigner(self._secret)
        self._faces = self._make_faces(self._engine, me, signer, registry)
        self._servicer = WorkerServicer(
            self._engine,
            self._faces(record.role),
            me,
            signer,
            record.model,
            record.role,
        )
        address = await self._listen(self._servicer)
        servicer = self._servicer
        self._holdings = HoldingsMetrics(self._engine, record.role, lambda: servicer.busy)
        self._record = replace(
            self._record,
            address=address,
            transfer_addresses=info.transfer_addresses,
            transport=info.transport,
            layout=info.layout,
            geometry=info.geometry,
            block_size=info.block_size,
            num_blocks=info.num_blocks,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            plans_ahead=info.plans_ahead,
            graph_tokens=info.graph_tokens,
            metrics_address=self._serve_metrics(),
        )

    def _refuse_unservable(self, info: EngineInfo) -> None:
        room = (info.num_blocks - 1) * info.block_size  # vLLM keeps one block for itself
        if room < info.max_model_len:
            raise ConfigError(
                f"models.{self._model.name}.kv_cache_bytes: holds"
                f" {room} tokens, and one request may take"
                f" {info.max_model_len}; raise it or lower max_model_len"
            )

    async def _listen(self, servicer: WorkerServicer) -> str:
        server = RpcServer(LIMITS, lambda _: ())
        registered: Any = server  # what generated code asks of one of grpc.aio's
        worker_pb2_grpc.add_WorkerServicer_to_server(servicer, registered)
        health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, registered)
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        address = take(
            lambda host, port: server.bind(host.strip("[]"), port, None),
            self._host,
            self._config.worker.ports,
            "worker.host, worker.ports",
        )
        await server.start()
        self._server = server
        return address

    def _serve_metrics(self) -> str:
        def serve(host: str, port: int) -> int:
            server, _ = prometheus_client.start_http_server(port, addr=host.strip("[]"))
            return int(server.server_port)

        ports = self._config.worker.metrics_ports
        return take(serve, self._host, ports, "worker.host, worker.metrics_ports")

    async def run_until_stopped(self) -> None:
        """Serves until `stop`.

        Raises:
            EngineFailed: the engine died, or a newer life of the worker has taken over.
        """
        assert self._engine is not None and self._membership is not None
        died = asyncio.create_task(self._engine.dead())
        waits = {
            died,
            asyncio.create_task(self._membership.superseded.wait()),
            asyncio.create_task(self._stopped.wait()),
        }
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._stopped.is_set():
            return
        cause = died.result() if died.done() and not died.cancelled() else "superseded"
        await self._announce_if_possible("failed", cause)
        raise EngineFailed(cause)

    async def set_role(self, role: str, drain_seconds: float) -> int:
        """Takes another role with the engine as it is: weights loaded, KV where it is.

        While it drains it takes no work. What still runs after `drain_seconds` is not touched: it
        goes on to its end beside the new role's work. The registry gets the role under the next
        epoch, so that nothing written late can put the former one back.

        Returns:
            The sequences that were still running.

        Raises:
            Unavailable: it is not ready or about to stop, or the store is out; the role is as it
                was.
        """
        if role == self._record.role:
            return 0
        if self._servicer is None or self._holdings is None or self._record.state != "ready":
            raise Unavailable(f"worker {self._record.worker_id} is {self._record.state}")
        try:
            await self._announce("draining", f"becomes {role}")
        except Unavailable:
            await self._announce_if_possible("ready", "")
            raise
        await asyncio.sleep(SETTLE_SECONDS)
        left = await self._servicer.drain(drain_seconds)
        if self._stopping or self.record.state != "draining":
            raise Unavailable(f"worker {self._record.worker_id} ends")
        self._servicer.change_role(role, self._faces(role))
        self._holdings.change_role(role)
        self._record = replace(self._record, role=role, epoch=self._record.epoch + 1)
        await self._announce_if_possible("ready", "")  # else with the next renewal
        return left

    async def stop(self, drain_seconds: float) -> None:
        """Drains, then ends every part; harmless if it never started."""
        self._stopping = True
        if self._servicer is not None and self._membership is not None:
            self._servicer.draining = True
            await self._announce_if_possible("draining", "stopping")
            await self._servicer.drain(drain_seconds)
        self._stopped.set()
        if self._holdings is not None:
            self._holdings.stop()
        if self._server is not None:
            await self._server.stop(0)
        if self._engine is not None:
            await self._engine.stop()
        if self._membership is not None:
            await self._membership.withdraw()

    async def _announce_if_possible(
        self, state: Literal["ready", "draining", "failed"], detail: str
    ) -> None:
        """What must go on also while the store is out."""
        try:
            await self._announce(state, detail)
        except Unavailable as error:
            log.warning("not announced as %s: %s", state, error)

    async def _announce(
        self, state: Literal["starting", "ready", "draining", "failed"], detail: str
    ) -> None:
        assert self._membership is not None
        self._record = replace(self._record, state=state, detail=detail)
        await self._membership.announce(self._record)
