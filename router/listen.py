"""Binding of the router's ports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cluster.config import RouterConfig
from cluster.errors import ConfigError
from cluster.rpc.limits import Limits
from cluster.rpc.server import RpcServer
from pdserve.v1 import batch_pb2, inference_pb2, operator_pb2
from router.caller import certificate_names
from router.tls import grpc_context, http_context

LOOPBACK = "127.0.0.1"
HTTP_SHUTDOWN_SECONDS = 1.0
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
BATCH = batch_pb2.DESCRIPTOR.services_by_name["Batch"].full_name
OPERATOR = operator_pb2.DESCRIPTOR.services_by_name["Operator"].full_name

log = logging.getLogger(__name__)


def rpc_server(config: RouterConfig) -> RpcServer:
    """A server without methods yet."""
    # Calls that wait take a stream as well, and so do those that cancel others or ask for health.
    calls = max(100, 4 * config.max_running_requests)
    limits = Limits(config.max_request_bytes, calls)
    return RpcServer(limits, certificate_names)


def bind_grpc(server: RpcServer, config: RouterConfig, setting: str = "grpc_port") -> int:
    """The port it listens on, as `setting` says. Raises ConfigError if it is taken or TLS cannot
    work."""
    host, wanted = config.host or LOOPBACK, getattr(config, setting)
    context = None if config.tls is None else grpc_context(config.tls)
    try:
        return server.bind(host, wanted, context)
    except OSError as error:
        raise _taken(host, wanted, f"router.{setting}") from error


async def bind_http(app: web.Application, config: RouterConfig) -> tuple[web.AppRunner, int]:
    """Serves `app` on a port; the caller cleans the runner up. Errors as of `bind_grpc`."""
    host = config.host or LOOPBACK
    context = None if config.tls is None else http_context(config.tls)
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=HTTP_SHUTDOWN_SECONDS
    )
    await runner.setup()
    site = web.TCPSite(runner, host, config.http_port, reuse_port=False, ssl_context=context)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise _taken(host, config.http_port, "router.http_port") from error
    return runner, int(runner.addresses[0][1])


class Health:
    """grpc.health.v1 and reflection of one server. Operator serves always, the rest – and the
    server as such, where there is a rest – once there are workers."""

    def __init__(self, server: RpcServer, services: Sequence[str]) -> None:
        self._servicer = _Servicer()
        self._serving: bool | None = None
        rest = [name for name in services if name != OPERATOR]
        self._always = [name for name in ("", *services) if name == OPERATOR or not (name or rest)]
        self._with_workers = ["", *rest] if rest else []
        # The generated functions ask of a server what `RpcServer` has.
        registered: Any = server
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, registered)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflecting = reflection.aio.ReflectionServicer(names)
        add_reflection: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        add_reflection(reflecting, registered)

    async def start(self) -> None:
        for name in self._always:
            await self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self.set(False)

    async def set(self, serving: bool) -> None:
        """Tells health checkers whether requests can be served."""
        if serving == self._serving:
            return
        self._serving = serving
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in self._with_workers:
            await self._servicer.set(name, status)

    async def stop(self) -> None:
        """NOT_SERVING for good."""
        with contextlib.suppress(Exception):
            await self._servicer.enter_graceful_shutdown()


def _taken(host: str, port: int, setting: str) -> ConfigError:
    return ConfigError(
        f"{setting}: cannot listen on {join(host, port)}: the port is in use or not permitted; "
        f"stop what uses it or set {setting} to another one (0 takes a free one)"
    )


def join(host: str, port: int) -> str:
    """host:port, with the brackets that IPv6 needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Servicer(health.aio.HealthServicer):
    """Writes without the lock that the library's own holds meanwhile: a watcher that does not read
    would hold up every change of health, and the router's end."""

    async def Watch(self: Any, request: Any, context: Any) -> None:
        service, last = request.service, None
        condition = self._server_watchers[service]
        self._watcher_count_by_service[service] += 1
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        try:
            while True:
                async with condition:
                    while (status := self._server_status.get(service, unknown)) == last:
                        await condition.wait()
                await context.write(health_pb2.HealthCheckResponse(status=status))
                last = status
        finally:
            self._watcher_count_by_service[service] -= 1
            if self._watcher_count_by_service[service] == 0:
                del self._server_watchers[service]
                del self._watcher_count_by_service[service]
