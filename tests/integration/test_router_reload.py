"""What a router takes over while it serves: limits, targets, callers and what their files hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.config import Config
from cluster.errors import ConfigError
from pdserve.v1 import inference_pb2_grpc
from router.joint import JointPlacement
from router.placement import Decision, Demand, Unplaced
from tests.integration.router_fakes import MODEL, Cluster, running_cluster
from tests.integration.test_router_grpc import TIMEOUT, ask, collect, refusal, tokens_of

FIRST, SECOND, NEXT = (f"a-token-of-the-{name}" for name in ("first", "second", "next-one"))


def shown(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def changed(**sections: Any) -> Config:
    """The cluster's configuration with other sections."""
    kept = {
        "models": [{"name": MODEL, "path": "/nowhere"}],
        "router": {"grpc_port": 0, "http_port": 0},
        "placement": {"disaggregate": "always"},
    }
    return Config.model_validate({**kept, **sections})


def tenant(folder: Path, name: str, token: str, **more: Any) -> dict[str, Any]:
    (folder / name).write_text(token)
    return {"name": name, "token_file": str(folder / name), **more}


async def serves(cluster: Cluster, token: str) -> bool:
    """Whether a request with this token is let in; no other refusal than that may come."""
    async with grpc.aio.insecure_channel(cluster.router.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(ask(), timeout=TIMEOUT, metadata=shown(token))
        try:
            return bool(tokens_of(await collect(call)))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False


async def test_tenants_come_go_and_change_their_tokens(tmp_path: Path) -> None:
    first, second = tenant(tmp_path, "first", FIRST), tenant(tmp_path, "second", SECOND)
    async with running_cluster(tenants=[first]) as cluster:
        assert [await serves(cluster, t) for t in (FIRST, SECOND)] == [True, False]
        both = changed(tenants=[first, second])
        cluster.router.reload(both)
        assert [await serves(cluster, t) for t in (FIRST, SECOND)] == [True, True]
        (tmp_path / "first").write_text(f"{FIRST}\n{NEXT}")  # the new one before the old one goes
        cluster.router.reload(both)
        assert [await serves(cluster, t) for t in (FIRST, NEXT)] == [True, True]
        cluster.router.reload(changed(tenants=[second]))
        assert [await serves(cluster, t) for t in (FIRST, NEXT, SECOND)] == [False, False, True]


async def test_credentials_that_cannot_be_read_leave_the_callers_as_they_were(
    tmp_path: Path,
) -> None:
    first, second = tenant(tmp_path, "first", FIRST), tenant(tmp_path, "second", SECOND)
    async with running_cluster(tenants=[first]) as cluster:
        (tmp_path / "second").unlink()
        with pytest.raises(ConfigError, match=r"tenants\.second\.token_file.*cannot be read"):
            cluster.router.reload(changed(tenants=[first, second]))
        assert [await serves(cluster, t) for t in (FIRST, SECOND)] == [True, False]


async def test_a_tenants_limits_hold_from_the_next_request(tmp_path: Path) -> None:
    slow = {"requests_per_second": 0.001, "burst_seconds": 1}
    free = tenant(tmp_path, "first", FIRST)
    async with (
        running_cluster(tenants=[free]) as cluster,
        grpc.aio.insecure_channel(cluster.router.grpc_address) as channel,
    ):
        stub = inference_pb2_grpc.InferenceStub(channel)

        def call() -> Any:
            return stub.Generate(ask(), timeout=TIMEOUT, metadata=shown(FIRST))

        await collect(call())
        cluster.router.reload(changed(tenants=[{**free, "limits": slow}]))
        await collect(call())  # what a second's worth of its rate lets pass
        code, said, _ = await refusal(call())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "0.001" in said
        cluster.router.reload(changed(tenants=[free]))
        assert tokens_of(await collect(call()))


async def test_placement_takes_other_targets_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float]] = []
    place = JointPlacement.place

    def seen(self: JointPlacement, now: float, demand: Demand) -> Decision | Unplaced:
        asked.append((demand.ttft_seconds, demand.tpot_seconds))
        return place(self, now, demand)

    monkeypatch.setattr(JointPlacement, "place", seen)
    async with (
        running_cluster() as cluster,
        grpc.aio.insecure_channel(cluster.router.grpc_address) as channel,
    ):
        generate = inference_pb2_grpc.InferenceStub(channel).Generate
        await collect(generate(ask(), timeout=TIMEOUT))
        targets = {"ttft_seconds": 0.25, "tpot_seconds": 0.01}
        cluster.router.reload(changed(targets=targets))
        await collect(generate(ask(), timeout=TIMEOUT))
    assert asked[0] == (2.0, 0.1) and asked[-1] == (0.25, 0.01)


async def test_the_next_request_is_of_the_class_that_the_classes_now_say() -> None:
    async with (
        running_cluster() as cluster,
        grpc.aio.insecure_channel(cluster.router.grpc_address) as channel,
    ):
        generate = inference_pb2_grpc.InferenceStub(channel).Generate
        await collect(generate(ask(), timeout=TIMEOUT))
        cluster.router.reload(changed(classes={"interactive_deadline_seconds": 2 * TIMEOUT}))
        await collect(generate(ask(), timeout=TIMEOUT))
        await cluster.router.stop(0)  # which writes the journal out
    ended = [e.slo_class for e in cluster.journal.entries if e.state == "finished"]
    assert ended == ["standard", "interactive"]
