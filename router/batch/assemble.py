"""Puts a router's batch part together, where there is a store to keep jobs in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from cluster.clock import Clock
from cluster.config_clients import BatchConfig
from cluster.rpc.server import RpcServer
from cluster.store.batches import Batches
from cluster.store.files import Files
from pdserve.v1 import batch_pb2_grpc
from router.batch.desk import BatchDesk
from router.batch.runner import BatchRunner
from router.batch.serve import LineServer
from router.batch.servicer import BatchServicer
from router.http.batches import BatchHandlers
from router.reception import Reception
from router.tenants import Tenants


@dataclass(frozen=True)
class BatchStore:
    """The store's parts that batch jobs live in."""

    batches: Batches
    files: Files


@dataclass(frozen=True)
class BatchPart:
    """What a router runs and serves for batch jobs."""

    runner: BatchRunner
    routes: Sequence[web.RouteDef]


def batch_part(
    config: BatchConfig,
    store: BatchStore,
    server: RpcServer,
    reception: Reception,
    tenants: Tenants,
    owner: str,
    clock: Clock,
) -> BatchPart:
    """Adds the Batch service to `server`."""
    serve = LineServer(reception, tenants, clock)
    runner = BatchRunner(config, store.batches, serve, owner, clock)
    desk = BatchDesk(config, store.batches, store.files, clock, runner.submitted)
    servicer = BatchServicer(desk, tenants, config.max_file_bytes)
    batch_pb2_grpc.add_BatchServicer_to_server(servicer, server)
    handlers = BatchHandlers(desk, tenants, config.max_file_bytes)
    return BatchPart(runner, handlers.routes)
