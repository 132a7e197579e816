"""The router's gRPC ports: the clients', and the operators' where they have one of their own."""

from __future__ import annotations

import contextlib

from cluster.config import RouterConfig
from cluster.rpc.server import RpcServer
from router.listen import BATCH, INFERENCE, OPERATOR, Health, bind_grpc, join, rpc_server

GRACE_SECONDS = 1.0


class GrpcPorts:
    """Their servers with health and reflection.

    Args:
        host: where others reach this router.

    Attributes:
        clients, operators: take services until `start`; one server where the port is one.
        address, operator_address: once bound.
    """

    def __init__(self, config: RouterConfig, host: str) -> None:
        self._config, self._host = config, host
        self.clients = self.operators = rpc_server(config)
        if config.operator_port is not None:
            self.operators = rpc_server(config)
        self.address = self.operator_address = ""
        self._health: list[Health] = []

    def bind(self, stack: contextlib.AsyncExitStack) -> None:
        """Takes the ports, until `stack` is closed. Raises ConfigError as `bind_grpc`."""
        self.address = self._bind(self.clients, "grpc_port", stack)
        if self.operators is self.clients:
            self.operator_address = self.address
            self._health = [Health(self.clients, (INFERENCE, BATCH, OPERATOR))]
            return
        self.operator_address = self._bind(self.operators, "operator_port", stack)
        self._health = [
            Health(self.clients, (INFERENCE, BATCH)),
            Health(self.operators, (OPERATOR,)),
        ]

    async def start(self) -> None:
        for health in self._health:
            await health.start()
        for server in {self.clients, self.operators}:
            await server.start()

    async def set_serving(self, serving: bool) -> None:
        """Tells health checkers whether requests can be served."""
        for health in self._health:
            await health.set(serving)

    async def stop_serving(self) -> None:
        """NOT_SERVING for good."""
        for health in self._health:
            await health.stop()

    def _bind(self, server: RpcServer, setting: str, stack: contextlib.AsyncExitStack) -> str:
        address = join(self._host, bind_grpc(server, self._config, setting))
        stack.push_async_callback(server.stop, GRACE_SECONDS)
        return address
