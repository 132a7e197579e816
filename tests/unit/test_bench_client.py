"""The connections of `pdserve bench`, over routers that answer as they are told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from cluster.cli import bench_client
from cluster.cli.bench_client import Client
from cluster.cli.bench_request import Meter
from cluster.errors import DeadlineExceeded, Unavailable
from cluster.rpc.client import CallFailed
from pdserve.v1 import inference_pb2

GONE = CallFailed(grpc.StatusCode.UNAVAILABLE, "gone")
REQUEST = inference_pb2.GenerateRequest(model="m")
REQUEST.token_ids.ids.append(1)
REQUEST.sampling.max_tokens = 1


class Call:
    """Answers at once."""

    def __init__(self, received: Callable[[bytes], None]) -> None:
        self.received = received
        self.finished = asyncio.get_running_loop().create_future()

    def send(self, message: bytes) -> None:
        answer = inference_pb2.GenerateResponse()
        answer.delta.token_ids.append(7)
        report = inference_pb2.GenerateResponse()
        report.completed.completions.add()
        for each in (answer, report):
            self.received(each.SerializeToString())

    def send_no_more(self) -> None:
        self.finished.set_result(None)

    def cancel(self) -> None: ...


class Routers:
    """By address: `up`, `down` (connecting fails) or `silent` (it never ends)."""

    def __init__(self, **states: str) -> None:
        self.states = states
        self.asked: list[str] = []
        self.silent = 0

    @asynccontextmanager
    async def connected(self, address: str, *_: Any) -> AsyncIterator[Any]:
        if self.states[address] == "silent":
            self.silent += 1
            await asyncio.Event().wait()
        if self.states[address] == "down":
            raise GONE
        yield Connection(self, address)


class Connection:
    def __init__(self, routers: Routers, address: str) -> None:
        self.routers = routers
        self.address = address

    def open(self, _: str, __: Any, received: Callable[[bytes], None]) -> Call:
        if self.routers.states[self.address] != "up":
            raise GONE
        self.routers.asked.append(self.address)
        return Call(received)


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PDSERVE_TOKEN", "PDSERVE_CA_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench_client, "SHUN_SECONDS", 0.0)


def client(monkeypatch: pytest.MonkeyPatch, routers: Routers) -> Client:
    monkeypatch.setattr(bench_client, "connected", routers.connected)
    return Client(tuple(routers.states), 60.0, Meter())


async def test_equals_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    routers = Routers(a="up", b="up", c="up")
    async with client(monkeypatch, routers) as to:
        for _ in range(6):
            seen, _ = await to.ask(REQUEST)
            assert seen.end == "ok"
    assert routers.asked[:3] == routers.asked[3:]
    assert sorted(routers.asked[:3]) == ["a", "b", "c"]


async def test_no_request_waits_for_a_router_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routers = Routers(a="up", b="up")
    async with client(monkeypatch, routers) as to:
        routers.states["a"] = "silent"
        for _ in range(5):
            seen, _ = await to.ask(REQUEST)  # it would never come back
            await asyncio.sleep(0)
            assert seen.end == "ok"
        assert (set(routers.asked), routers.silent) == ({"b"}, 1)


async def test_a_router_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    routers = Routers(a="down", b="up")
    async with client(monkeypatch, routers) as to:
        await to.ask(REQUEST)
        routers.states["a"] = "up"
        for _ in range(4):
            await to.ask(REQUEST)
            await asyncio.sleep(0)
        assert "a" in routers.asked
        routers.states.update(a="down", b="down")
        seen, _ = await to.ask(REQUEST)
        assert (seen.end, seen.reason, seen.late) == ("failed", "UNAVAILABLE: gone", None)


async def test_what_it_waited_here_is_in_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    async with client(monkeypatch, Routers(a="up")) as to:
        seen, _ = await to.ask(REQUEST, due=time.perf_counter() - 5.0)
        assert seen.late is not None and seen.late >= 5.0
        assert seen.answered is not None
        assert seen.answered.e2e >= seen.answered.first >= seen.late
        seen, _ = await to.ask(REQUEST)
        assert seen.late is None


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
async def test_a_router_that_names_no_models_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """The first one of two; of one it is the failure."""
    reply = inference_pb2.ListModelsResponse()
    reply.models.add(name="m", ready=True)
    calls: list[str] = []

    class Stub:
        def __init__(self, _: Any) -> None: ...

        async def ListModels(self, *_: Any, **__: Any) -> Any:
            calls.append(code)
            if len(calls) == 1 or fails:
                raise grpc.aio.AioRpcError(
                    grpc.StatusCode[code], grpc.aio.Metadata(), grpc.aio.Metadata(), "no answer"
                )
            return reply

    monkeypatch.setattr(bench_client.inference_pb2_grpc, "InferenceStub", Stub)
    fails = False
    assert (await bench_client.served_model(("h:1", "h:2"), "")).name == "m"
    fails = True
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await bench_client.served_model(("h:1",), "")
