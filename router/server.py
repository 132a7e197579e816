"""The router as a process part: builds everything, serves, and stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Mapping
from functools import partial

from aiohttp import web
from prometheus_client import CollectorRegistry

from cluster.clock import Clock, SystemClock
from cluster.config import Config
from cluster.errors import Unavailable
from cluster.obs.metrics import RouterMetrics
from cluster.obs.tracing import tracer_from_environment
from cluster.pace import Pace
from cluster.ticket import TicketSigner
from pdserve.v1 import inference_pb2_grpc, operator_pb2_grpc
from router.background import Background, Part
from router.batch.assemble import BatchPart, batch_part
from router.cancel import Canceller
from router.capacity import Capacities, Paces, policy
from router.catalog import Catalog
from router.demand import DemandReport
from router.descriptors import allow
from router.dispatch import Dispatch
from router.fleet import Fleet
from router.http.app import HttpApp
from router.http.generate import GenerateHandlers
from router.inference import InferenceServicer
from router.intake import Intake
from router.joint import JointPlacement
from router.lease import RouterLease, record_of
from router.listen import LOOPBACK, bind_http, join
from router.observe import Observer
from router.operator import OperatorServicer
from router.placer import Placer
from router.plan_metrics import PlanMetrics
from router.ports import GrpcPorts
from router.readiness import Readiness
from router.reception import Reception
from router.recording import Recording
from router.resume.service import Resumption
from router.store import Store, connect
from router.tenants import Tenants
from router.tickets import TicketMint
from router.tokenize import Tokenizer
from router.workers import Workers

JOURNAL_FLUSH_SECONDS = 1.0
STREAMS_SECONDS = 2.0
SHUTTING_DOWN = "the router is shutting down"

log = logging.getLogger(__name__)


class RouterServer:
    """One router.

    Args:
        secret: the cluster's, of at least 16 bytes.
        store_url: redis://…
        advertised_host: where others reach it, if not at `config.router.host`.
        store: in place of the one at `store_url`.
        tokenizers: by model, in place of the models' own.
    """

    def __init__(
        self,
        config: Config,
        router_id: str,
        incarnation: str,
        secret: bytes,
        store_url: str,
        *,
        advertised_host: str = "",
        store: Store | None = None,
        tokenizers: Mapping[str, Tokenizer] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._router_id = router_id
        self._incarnation = incarnation
        self._secret = secret
        self._signer = TicketSigner(secret)
        self._store_url = store_url
        self._host = advertised_host or config.router.host or LOOPBACK
        self._store = store
        self._tokenizers = tokenizers
        self._clock = clock or SystemClock()
        self._stack = contextlib.AsyncExitStack()
        self._background = Background(self._broke)
        self._readiness = Readiness(self.not_ready)
        self._stopping = False
        self.broken = asyncio.Event()
        """Set when a part of the router has died: it serves errors only and must be replaced."""
        self.metrics = RouterMetrics(CollectorRegistry())
        self.grpc_address = ""
        self.http_address = ""
        self.operator_address = ""

    async def start(self) -> None:
        """Reads the tokenizers, connects to the store, binds the ports and serves.

        Raises:
            ConfigError: a port is taken, or a model's files cannot be read.
            Unavailable: the store does not answer.
        """
        try:
            await self._start()
        except BaseException:
            await self._background.end()
            await self._stack.aclose()
            raise

    async def _start(self) -> None:
        config, clock = self._config, self._clock
        allow(config.router.max_running_requests + config.router.max_queued_requests)
        store = self._store or await connect(config, self._store_url, self._stack)
        self._fleet = fleet = Fleet(config.placement.prefix_blocks)
        mode = config.placement.disaggregate
        self._workers = Workers(
            store.registry,
            self._router_id,
            self._signer,
            self.metrics,
            clock,
            config.store.lease_seconds,
            fleet,
            mode,
        )
        self._catalog = Catalog(config.models, lambda: self._workers.records, self._tokenizers)
        self._stack.callback(self._catalog.close)
        await self._catalog.load()
        self._observer = Observer(
            self.metrics, self._router_id, clock, tracer_from_environment("pdserve-router")
        )
        tenants = self._tenants = Tenants(config, self._secret, self._signer.call_token())
        placement = JointPlacement(fleet, mode, random.Random())
        measured = self._observer.demand.measured
        self._placer = Placer(fleet, placement, config.targets, self.metrics, clock, measured)
        self._dispatch = Dispatch(
            policy(config),
            Capacities(config.models, self._workers, mode, Paces(fleet, mode)),
            self._workers,
            self._placer,
            TicketMint(self._signer, clock, config.handoff.ticket_seconds),
            self._observer,
            clock,
            self._catalog.settled,
            Pace(),
        )
        self._canceller = Canceller(self._dispatch.cancel, store.cancellations)
        intake = Intake(self._catalog, clock)
        owner = f"{self._router_id} {self._incarnation}"
        self._resumption = Resumption(config.resume, store.streams, self._dispatch, owner, clock)
        self._stack.push_async_callback(self._resumption.stop)
        reception = Reception(
            config.classes, self._catalog, intake, self._dispatch, self._resumption, self._observer
        )
        self._reception = reception
        self._ports = ports = GrpcPorts(config.router, self._host)
        inference_pb2_grpc.add_InferenceServicer_to_server(
            InferenceServicer(
                tenants,
                self._catalog,
                intake,
                reception,
                self._canceller,
                clock,
                self._workers.missing,
            ),
            ports.clients,
        )
        self._batch: BatchPart | None = None
        if store.batch is not None:
            self._batch = batch_part(
                config.batch, store.batch, ports.clients, reception, tenants, owner, clock
            )
        ports.bind(self._stack)
        self.grpc_address, self.operator_address = ports.address, ports.operator_address
        runner, port = await bind_http(self._http(tenants, reception), config.router)
        self._stack.push_async_callback(runner.cleanup)
        self.http_address = join(self._host, port)
        addresses = (self.grpc_address, self.http_address, self.operator_address)
        record = record_of(self._router_id, self._incarnation, addresses, clock)
        self._lease = RouterLease(store.registry, record, config.store.lease_seconds)
        operator_pb2_grpc.add_OperatorServicer_to_server(
            OperatorServicer(
                config.name,
                self._lease.record,
                self._workers,
                store.registry,
                self._dispatch,
                tenants,
                self._placer,
                store.plans,
                self._catalog.names,
                Recording(self._observer, store.journal),
                lambda: self._observer.lately.report(clock.now()),
            ),
            ports.operators,
        )
        await ports.start()
        self._workers.on_change(self._dispatch.workers_changed)
        self._workers.on_change(self._readiness.change)
        self._background.start(self._parts(store))
        where = (self._router_id, self.grpc_address, self.http_address)
        log.info("router %s serves gRPC %s HTTP %s", *where)

    def not_ready(self) -> str:
        """Why requests cannot be served now; empty if they can."""
        if self._stopping:
            return SHUTTING_DOWN
        if not self._background.runs:
            return "the router is broken and must be restarted"
        reasons = [self._workers.missing(name) for name in self._catalog.names]
        return "; ".join(filter(None, reasons))

    def reload(self, config: Config) -> None:
        """Takes over the limits, targets, classes and callers of `config`, and nothing else.

        Raises:
            ConfigError: credentials cannot be read; the callers are as they were.
        """
        self._dispatch.gate.set_policy(policy(config))
        self._reception.set_classes(config.classes)
        self._placer.set_targets(config.targets)
        self._tenants.reload(config)

    def demand(self, mark: tuple[int, int] | None) -> DemandReport:
        """As `DemandLog.since`."""
        return self._observer.demand.since(mark)

    async def wait_ready(self, timeout: float) -> None:
        """Until every model has a connected prefill and decode worker.

        Raises:
            Unavailable: not within `timeout` seconds; says what is missing.
        """
        await self._readiness.wait(timeout)

    async def stop(self, drain_seconds: float) -> None:
        """Takes nothing in, waits for what runs, gives the rest up, closes. Once."""
        if self._stopping or not self._background.started:
            return
        self._stopping = True
        await self._background.end_part("batch")  # Its pages are other routers' now.
        self._dispatch.refuse(Unavailable(SHUTTING_DOWN))
        self._resumption.abandon()
        await self._ports.stop_serving()
        await self._lease.drain()
        await self._dispatch.drain(drain_seconds)
        await self._resumption.recorded(STREAMS_SECONDS)
        await self._observer.flush(JOURNAL_FLUSH_SECONDS)
        await self._background.end()
        await self._lease.remove()
        await self._stack.aclose()

    def _parts(self, store: Store) -> dict[str, Part]:
        """What goes on beside the requests."""
        parts: dict[str, Part] = {
            "workers": self._workers.run,
            "lease": self._lease.run,
            "journal": partial(self._observer.write_journal, store.journal),
            "health": partial(self._readiness.report, self._ports.set_serving),
            "cancellations": self._canceller.serve,
        }
        if self._batch is not None:
            parts["batch"] = self._batch.runner.run
        if store.plans is not None:
            metrics = PlanMetrics(self.metrics.registry)
            parts["plan metrics"] = partial(metrics.follow, store.plans)
        return parts

    def _broke(self) -> None:
        self.broken.set()
        self._readiness.change()

    def _http(self, tenants: Tenants, reception: Reception) -> web.Application:
        settings = self._config.router
        handlers = GenerateHandlers(
            tenants, reception, self._clock, settings.default_timeout_seconds
        )
        registry = self.metrics.registry
        built = HttpApp(
            handlers,
            tenants,
            self._catalog,
            registry,
            self.not_ready,
            settings.max_request_bytes,
            self._batch.routes if self._batch is not None else (),
        )
        return built.app
