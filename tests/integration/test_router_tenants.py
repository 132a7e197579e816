"""Tenants over real sockets: who gets in, what is refused and how, TLS, and workers' salts."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pdserve.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)
from tests.integration.certificates import make_certificates
from tests.integration.router_fakes import MODEL, SIGNER, Cluster, running_cluster
from tests.integration.test_router_grpc import TIMEOUT, ask, collect, refusal, tokens_of

TOKENS = {"first": "token-of-the-first-tenant", "second": "token-of-the-second-one"}
COMPLETION = {"model": MODEL, "prompt": "hi", "max_tokens": 2}


def metadata(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[tenant]}"),)


def headers(tenant: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[tenant]}"}


@pytest.fixture
def tenants(tmp_path: Path) -> list[dict[str, Any]]:
    for name, token in TOKENS.items():
        (tmp_path / name).write_text(token)
    limits = {"requests_per_second": 0.5, "burst_seconds": 4}
    return [
        {"name": "first", "token_file": str(tmp_path / "first")},
        {
            "name": "second",
            "token_file": str(tmp_path / "second"),
            "classes": ["standard", "batch"],
            "limits": limits,
        },
    ]


@pytest.fixture
async def cluster(tenants: list[dict[str, Any]]) -> AsyncIterator[Cluster]:
    async with running_cluster(tenants=tenants) as cluster:
        yield cluster


@pytest.fixture
async def channel(cluster: Cluster) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(cluster.router.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceStub(channel)


async def test_only_tenants_get_in(cluster: Cluster, stub: Any, channel: Any) -> None:
    for call in (
        stub.Generate(ask(), timeout=TIMEOUT),
        stub.Generate(ask(), timeout=TIMEOUT, metadata=(("authorization", "Bearer wrong"),)),
    ):
        code, message, _ = await refusal(call)
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "credentials" in message
    for method, request in (
        (stub.Cancel, inference_pb2.CancelRequest(request_id="x")),
        (stub.Tokenize, inference_pb2.TokenizeRequest(text="x")),
        (stub.ListModels, inference_pb2.ListModelsRequest()),
        (operator_pb2_grpc.OperatorStub(channel).GetCluster, operator_pb2.GetClusterRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(request, timeout=TIMEOUT)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    done = await collect(stub.Generate(ask(), timeout=TIMEOUT, metadata=metadata("first")))
    assert tokens_of(done) == [10, 11, 12, 13]


async def test_the_operator_api_takes_the_clusters_own_token(channel: Any) -> None:
    stub = operator_pb2_grpc.OperatorStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetCluster(
            operator_pb2.GetClusterRequest(), timeout=TIMEOUT, metadata=metadata("first")
        )
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    own = (("authorization", f"Bearer {SIGNER.call_token()}"),)
    view = await stub.GetCluster(operator_pb2.GetClusterRequest(), timeout=TIMEOUT, metadata=own)
    assert len(view.workers) == 2


async def test_tenants_caches_are_apart_on_the_workers(cluster: Cluster, stub: Any) -> None:
    salts = []
    for tenant in ("first", "second"):
        for salt in ("", "mine"):
            request = ask()
            request.cache_salt = salt
            await collect(stub.Generate(request, timeout=TIMEOUT, metadata=metadata(tenant)))
            start = cluster.prefill.started.get_nowait()
            assert start.cache_salt == cluster.prefill.ticket(start).tenant_salt
            salts.append(start.cache_salt)
    assert len(set(salts)) == 4
    assert "mine" not in salts and "" not in salts


async def test_a_request_id_belongs_to_its_tenant(cluster: Cluster, stub: Any) -> None:
    cluster.decode.gate.clear()
    request = ask()
    request.request_id = "mine"
    calls = [stub.Generate(request, timeout=TIMEOUT, metadata=metadata(name)) for name in TOKENS]
    for call in calls:
        await call.read()
    cancel = inference_pb2.CancelRequest(request_id="mine")
    done = await stub.Cancel(cancel, timeout=TIMEOUT, metadata=metadata("first"))
    assert done.cancelled
    code, _, _ = await refusal(calls[0])
    assert code is grpc.StatusCode.CANCELLED
    cluster.decode.gate.set()
    assert (await collect(calls[1]))[-1].HasField("completed")


async def test_the_operator_is_told_whose_request_it_is_and_tenants_nothing(
    stub: Any, channel: grpc.aio.Channel
) -> None:
    used = {}
    for tenant, text in (("first", "hi"), ("second", "hi, again")):
        request = ask(text)
        request.request_id = "mine"
        done = await collect(stub.Generate(request, timeout=TIMEOUT, metadata=metadata(tenant)))
        used[tenant] = [done[-1].completed.usage.prompt_tokens]
    assert used["first"] < used["second"]
    explain = operator_pb2_grpc.OperatorStub(channel).Explain
    own = (("authorization", f"Bearer {SIGNER.call_token()}"),)

    async def refused(about: operator_pb2.ExplainRequest, shown: Any) -> tuple[Any, str]:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await explain(about, timeout=TIMEOUT, metadata=shown)
        return error.value.code(), error.value.details() or ""

    of = {
        tenant: operator_pb2.ExplainRequest(request_id="mine", tenant=tenant)
        for tenant in ("first", "second", "third", "")
    }
    for about in of.values():
        assert (await refused(about, metadata("first")))[0] is grpc.StatusCode.UNAUTHENTICATED
    code, said = await refused(of[""], own)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "first, second each have" in said
    assert (await refused(of["third"], own))[0] is grpc.StatusCode.NOT_FOUND
    prompts = {}
    for tenant in TOKENS:
        why = await explain(of[tenant], timeout=TIMEOUT, metadata=own)
        assert why.tenant == tenant
        prompts[tenant] = [decision.prompt_tokens for decision in why.decisions]
    assert prompts == used


async def test_over_the_limit(stub: Any) -> None:
    for _ in range(2):
        await collect(stub.Generate(ask(), timeout=TIMEOUT, metadata=metadata("second")))
    code, message, (detail,) = await refusal(
        stub.Generate(ask(), timeout=TIMEOUT, metadata=metadata("second"))
    )
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "0.5 requests per second" in message
    assert 0 < detail.retry_delay.ToNanoseconds() <= 2e9
    await collect(stub.Generate(ask(), timeout=TIMEOUT, metadata=metadata("first")))


async def test_a_class_that_is_not_allowed(stub: Any) -> None:
    request = ask()
    request.slo_class = common_pb2.SLO_CLASS_INTERACTIVE
    code, message, _ = await refusal(
        stub.Generate(request, timeout=TIMEOUT, metadata=metadata("second"))
    )
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "standard" in message


async def test_http(cluster: Cluster) -> None:
    async with aiohttp.ClientSession(cluster.url) as http:
        async with http.post("/v1/completions", json=COMPLETION) as reply:
            assert reply.status == 401
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert (await reply.json())["error"]["type"] == "authentication_error"
        async with http.get("/v1/models") as reply:
            assert reply.status == 401
        async with http.get("/healthz") as reply:
            assert reply.status == 200
        for _ in range(2):
            async with http.post(
                "/v1/completions", json=COMPLETION, headers=headers("second")
            ) as reply:
                assert reply.status == 200
        async with http.post(
            "/v1/completions", json=COMPLETION, headers=headers("second")
        ) as reply:
            assert reply.status == 429
            assert reply.headers["Retry-After"] in ("1", "2")
        for name, value in (
            ("X-Slo-Class", "urgent"),
            ("X-Priority", "high"),
            ("X-Priority", "1000"),
            ("X-Ttft-Target-Seconds", "-1"),
        ):
            bad = {**headers("first"), name: value}
            async with http.post("/v1/completions", json=COMPLETION, headers=bad) as reply:
                assert reply.status == 400
                assert (await reply.json())["error"]["param"] == name
        denied = {**headers("second"), "X-Slo-Class": "interactive"}
        async with http.post("/v1/completions", json=COMPLETION, headers=denied) as reply:
            assert reply.status == 403
        async with http.get("/metrics") as reply:
            metrics = await reply.text()
    assert 'pdserve_tenant_requests_total{status="OK",tenant="second"} 2.0' in metrics
    assert 'pdserve_slo_missed_total{class="standard",model="tiny",reason="refused"} 1.0' in metrics
    assert 'pdserve_slo_requests_total{class="standard",model="tiny"} 3.0' in metrics
    assert 'pdserve_slo_attained_total{class="standard",model="tiny"} 2.0' in metrics


async def test_more_urgent_work_starts_first(tenants: list[dict[str, Any]]) -> None:
    async with (
        running_cluster(tenants=tenants, max_running_requests=1) as cluster,
        grpc.aio.insecure_channel(cluster.router.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        cluster.decode.gate.clear()

        def send(name: str, **fields: Any) -> Any:
            request = ask()
            request.request_id = name
            for field, value in fields.items():
                setattr(request, field, value)
            return stub.Generate(request, timeout=TIMEOUT, metadata=metadata("first"))

        running = send("running")
        await running.read()
        calls = [running]
        for name, fields in (
            ("batch", {"slo_class": common_pb2.SLO_CLASS_BATCH}),
            ("low", {"priority": -1}),
            ("high", {"priority": 1}),
            ("now", {"slo_class": common_pb2.SLO_CLASS_INTERACTIVE}),
        ):
            calls.append(send(name, **fields))
            while cluster.router._dispatch.running < len(calls):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        cluster.decode.gate.set()
        await asyncio.gather(*map(collect, calls))
        order = [cluster.prefill.started.get_nowait().sequence_id.split("/")[0] for _ in calls]
        assert order == ["running", "now", "high", "low", "batch"]


async def test_batch_work_gives_way_to_online_work_and_goes_on_after_it() -> None:
    async with (
        running_cluster(max_running_requests=1) as cluster,
        grpc.aio.insecure_channel(cluster.router.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)
        cluster.decode.gate.clear()
        request = ask(temperature=1)
        request.slo_class = common_pb2.SLO_CLASS_BATCH
        batch = stub.Generate(request, timeout=TIMEOUT)
        messages = [await batch.read()]
        online = stub.Generate(ask(), timeout=TIMEOUT)
        await online.read()
        await asyncio.wait_for(cluster.decode.cancelled.get(), TIMEOUT)
        cluster.decode.gate.set()
        assert (await collect(online))[-1].HasField("completed")
        messages += await collect(batch)
        assert tokens_of(messages) == [10, 11, 12, 13]
        prompts = [len(cluster.prefill.started.get_nowait().prompt_token_ids) for _ in range(3)]
        assert prompts == [3, 3, 4]


async def test_a_client_certificate_is_a_tenants_identity(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    tls = {
        "cert_file": tmp_path / "server.crt",
        "key_file": tmp_path / "server.key",
        "client_ca_file": tmp_path / "ca.crt",
    }
    tenants = [{"name": "first", "identities": ["first.example"]}]
    ca, key, cert = ((tmp_path / n).read_bytes() for n in ("ca.crt", "client.key", "client.crt"))
    async with running_cluster(tenants=tenants, tls=tls) as cluster:
        address = cluster.router.grpc_address
        credentials = grpc.ssl_channel_credentials(ca, key, cert)
        async with grpc.aio.secure_channel(address, credentials) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert tokens_of(await collect(stub.Generate(ask(), timeout=TIMEOUT)))
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            code, _, _ = await refusal(stub.Generate(ask(), timeout=TIMEOUT))
            assert code is grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        url = f"https://{cluster.router.http_address}/v1/completions"
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientError):
                await http.post(url, json=COMPLETION, ssl=context)
            context.load_cert_chain(tmp_path / "client.crt", tmp_path / "client.key")
            async with http.post(url, json=COMPLETION, ssl=context) as reply:
                assert reply.status == 200
