"""The Operator API on a port of its own: nothing of it is left on the clients' port, off loopback
it asks for credentials, and what the controller waits for is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.cli.access import channel
from cluster.cli.calls import ClusterView, cluster_view
from cluster.errors import ConfigError, Unauthenticated
from cluster.store.client import connect
from cluster.store.plan_records import WaitingWorker
from cluster.store.plans import Plans
from cluster.ticket import TicketSigner
from pdserve.v1 import inference_pb2_grpc, operator_pb2, operator_pb2_grpc
from tests.integration.router_fakes import SIGNER, running_cluster
from tests.integration.simulated import SECRET, config, simulated_cluster
from tests.integration.test_router_grpc import TIMEOUT, ask, collect, refusal, tokens_of

OPERATOR = "pdserve.v1.Operator"


async def health_of(to: Any, service: str) -> Any:
    stub = health_pb2_grpc.HealthStub(to)
    reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
    return reply.status


async def services_of(to: Any) -> set[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(to)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    reply = await anext(aiter(stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT)))
    return {service.name for service in reply.list_services_response.service}


async def test_each_port_serves_its_own_and_nothing_of_the_other() -> None:
    async with running_cluster(operator_port=0) as cluster:
        router = cluster.router
        assert router.operator_address != router.grpc_address
        async with (
            grpc.aio.insecure_channel(router.grpc_address) as clients,
            grpc.aio.insecure_channel(router.operator_address) as operators,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await operator_pb2_grpc.OperatorStub(clients).GetCluster(
                    operator_pb2.GetClusterRequest(), timeout=TIMEOUT
                )
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            generate = inference_pb2_grpc.InferenceStub(operators).Generate
            code, _, _ = await refusal(generate(ask(), timeout=TIMEOUT))
            assert code is grpc.StatusCode.UNIMPLEMENTED
            generate = inference_pb2_grpc.InferenceStub(clients).Generate
            assert tokens_of(await collect(generate(ask(), timeout=TIMEOUT)))
            view = await cluster_view(operators)
            assert view.routers[0].operator_address == router.operator_address
            assert OPERATOR in await services_of(operators)
            assert OPERATOR not in await services_of(clients)
            for to, service in ((clients, ""), (operators, ""), (operators, OPERATOR)):
                assert await health_of(to, service) == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await health_of(clients, OPERATOR)
            assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_off_loopback_every_call_to_it_needs_credentials() -> None:
    async with running_cluster(operator_port=0, host="0.0.0.0") as cluster:
        address = cluster.router.operator_address.replace("0.0.0.0", "127.0.0.1")
        async with channel(address) as stranger:
            with pytest.raises(Unauthenticated, match="operator's credentials"):
                await cluster_view(stranger)
        async with channel(address, SIGNER.call_token()) as to:
            assert len((await cluster_view(to)).workers) == 2


async def test_a_taken_operator_port_is_named() -> None:
    async with running_cluster() as cluster:
        port = int(cluster.router.grpc_address.rsplit(":", 1)[1])
        second = cluster.new_router("r-1", operator_port=port)
        with pytest.raises(ConfigError, match=rf"router\.operator_port.*{port}"):
            await second.start()


async def test_workers_without_a_process_are_told_with_what_they_wait_for(tmp_path: Path) -> None:
    async with simulated_cluster(
        tmp_path, {"p-0": "prefill", "d-0": "decode"}, config()
    ) as running:
        plans = Plans(await connect(running.store.url, 30.0), running.config.name)
        missing = WaitingWorker("d-1", "m", "decode", "waiting", "for 1 GPU; no host has 1 GPU")
        there = WaitingWorker("d-0", "m", "decode", "starting", "")  # it has registered since

        async def view() -> ClusterView:
            async with channel(
                running.router.grpc_address, TicketSigner(SECRET).call_token()
            ) as to:
                return await cluster_view(to)

        await plans.tell_waiting([there, missing], 60)
        *_, last = (await view()).workers
        assert (last.worker_id, last.state, last.detail) == ("d-1", "waiting", missing.detail)
        assert [w.worker_id for w in (await view()).workers].count("d-0") == 1
        await plans.tell_waiting([], 60)
        assert len((await view()).workers) == 2
