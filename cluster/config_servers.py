"""The `router` and `worker` parts of the configuration: their servers' ports and bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.config_clients import TlsConfig
from cluster.config_models import MIB, PoolConfig, Section
from cluster.ports import ANY, Ports

Port = Annotated[int, Field(ge=0, le=65535)]


class RouterConfig(Section):
    """The routers' servers and limits."""

    host: Annotated[
        str | None,
        Field(
            description="Interface to listen on: a name, an address, a network such as 10.0.0.0/8,"
            " or 0.0.0.0; unset: loopback, or on a Ray cluster of several hosts the host's own"
            " address in it."
        ),
    ] = None
    pool: Annotated[PoolConfig, Field(description="Each router is one process.")] = PoolConfig()
    grpc_port: Annotated[Port, Field(description="0 takes a free one.")] = 50051
    http_port: Annotated[Port, Field(description="0 takes a free one.")] = 8000
    operator_port: Annotated[
        Port | None,
        Field(
            description="The Operator API's own port, 0 for a free one; off loopback every call to"
            " it needs the operator's credentials. Unset: it is served on grpc_port."
        ),
    ] = None
    max_request_bytes: Annotated[
        int, Field(ge=1024, description="Largest request message or body, bytes.")
    ] = 8 * MIB
    max_running_requests: Annotated[
        int, Field(ge=1, description="Requests placed at once; more wait.")
    ] = 1024
    max_queued_requests: Annotated[
        int, Field(ge=0, description="Requests of a class waiting; more are refused.")
    ] = 1024
    default_timeout_seconds: Annotated[
        float, Field(gt=0, description="Deadline of HTTP requests that set none.")
    ] = 600.0
    tls: Annotated[TlsConfig | None, Field(description="Unset: the ports are in clear.")] = None

    def same_ports(self) -> str:
        """The fields that ask for one port, in words; empty if none do."""
        ports = {name: getattr(self, name) for name in ("grpc_port", "http_port", "operator_port")}
        taken = [port for port in ports.values() if port]
        return " and ".join(name for name, port in ports.items() if taken.count(port) > 1)


class WorkerConfig(Section):
    """The workers' own servers: routers' streams and metrics."""

    host: Annotated[
        str | None,
        Field(
            description="Interface to listen on: a name, an address or a network (10.0.0.0/8);"
            " unset: loopback, or on a Ray cluster of several hosts the host's own address in it."
        ),
    ] = None
    ports: Annotated[
        Ports, Field(description="Port of a worker's gRPC, a range where hosts carry several.")
    ] = ANY
    metrics_ports: Annotated[Ports, Field(description="The same for its metrics over HTTP.")] = ANY
