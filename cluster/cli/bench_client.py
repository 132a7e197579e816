"""The client of `pdserve bench`: connections to a router, requests over them, what came when.

Over `cluster.rpc` and not grpc.aio: a client takes a core, too, and one that takes several times
as much for a message measures itself several times as soon.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Literal, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from cluster.cli import access
from cluster.cli.bench_request import Meter, Watch
from cluster.cli.bench_seen import Seen
from cluster.cli.calls import grpc_errors
from cluster.errors import DeadlineExceeded, NotFound, PdserveError, Unavailable
from cluster.rpc.client import CallFailed, ClientCall, ClientConnection, connected
from cluster.rpc.limits import Limits
from pdserve.v1 import inference_pb2, inference_pb2_grpc

LIMITS = Limits(message_bytes=access.MAX_MESSAGE_BYTES, calls=0)
GENERATE = f"/{inference_pb2.DESCRIPTOR.services_by_name['Inference'].full_name}/Generate"
CONNECT_SECONDS, SHUN_SECONDS = 3.0, 1.0
LATE_SECONDS = 2.0
"""After a request's deadline; the router ends it at the deadline itself."""
CALLS_EACH = 128
"""On a connection, before another one is opened."""


@dataclass(frozen=True)
class Served:
    """A model of the cluster, as ListModels has it."""

    name: str
    vocab: int
    max_model_len: int


async def served_model(addresses: Sequence[str], name: str) -> Served:
    """The one called `name`, or the first, as the first router that answers has it.

    Raises:
        NotFound: there is none of that name.
        Unavailable, DeadlineExceeded: it cannot be served now, or no router answers.
    """
    reply = await _models(addresses)
    found = [model for model in reply.models if name in ("", model.name)]
    if not found:
        known = ", ".join(model.name for model in reply.models)
        raise NotFound(f"--model: the cluster serves {known}, not {name!r}")
    model = found[0]
    if not model.ready:
        raise Unavailable(f"{model.name} cannot be served now: see `pdserve status`")
    return Served(model.name, model.vocab_size, model.max_model_len)


async def _models(addresses: Sequence[str]) -> inference_pb2.ListModelsResponse:
    failure: PdserveError = Unavailable("no router to ask")
    for address in addresses:
        async with access.channel(address) as to:
            stub = inference_pb2_grpc.InferenceStub(to)
            try:
                with grpc_errors():
                    reply = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
            except (Unavailable, DeadlineExceeded) as error:
                failure = error
            else:
                return cast(inference_pb2.ListModelsResponse, reply)
    raise failure


@dataclass
class _Line:
    address: str
    connection: ClientConnection
    calls: int = 0


class Client:
    """Sends requests to routers, to whichever has the fewest. An async context manager.

    It connects to all of them at first. One that goes away is connected to again beside the
    requests, which wait for that only where there is no other.

    Args:
        addresses: of the routers.
        timeout: seconds, a request's deadline.
        meter: hears of tokens.
    """

    def __init__(self, addresses: Sequence[str], timeout: float, meter: Meter) -> None:
        self._addresses = addresses
        self._shunned: dict[str, float] = {}
        """Routers that could not be reached, and until when they are not asked again."""
        self._timeout = timeout
        self._meter = meter
        self._tls = access.tls()
        deadline = ("grpc-timeout", f"{max(1, round(timeout * 1000))}m")
        self._metadata = (deadline, *access.credentials())
        self._lines: list[_Line] = []
        """The one that was chosen last is the last."""
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._failure = CallFailed(grpc.StatusCode.UNAVAILABLE, "no router can be reached")
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Client:
        self._connect_missing()
        await asyncio.gather(*self._connecting.values())
        return self

    async def __aexit__(self, *_: object) -> None:
        connecting = list(self._connecting.values())
        for each in connecting:
            each.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        await self._stack.aclose()

    async def ask(
        self, request: inference_pb2.GenerateRequest, due: float | None = None
    ) -> tuple[Seen, float]:
        """Sends it, and waits for its end.

        Args:
            due: when it was to be sent, of `time.perf_counter`, from which its times count; None:
                now.

        Returns:
            What became of it, and after how many seconds a refused one may come again.
        """
        message = request.SerializeToString()
        prompt, output = len(request.token_ids.ids), request.sampling.max_tokens
        watch = Watch(time.perf_counter() if due is None else due, prompt, output, self._meter)
        try:
            await self._call(message, watch)
        except CallFailed as error:
            end: Literal["refused", "failed"] = "failed"
            reason = f"{error.code.name}: {error.details}"
            if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                end, reason = "refused", error.details
            return Seen(prompt, output, end, _late(watch, due), reason), _retry_seconds(error)
        answered, wrong = watch.end()
        if wrong:
            return Seen(prompt, output, "failed", _late(watch, due), wrong), 0.0
        return Seen(prompt, output, "ok", _late(watch, due), answered=answered), 0.0

    async def _call(self, message: bytes, watch: Watch) -> None:
        line, call = await self._open(watch)
        line.calls += 1
        try:
            watch.sent = time.perf_counter()
            call.send(message)
            call.send_no_more()
            async with asyncio.timeout(self._timeout + LATE_SECONDS):
                await asyncio.shield(call.finished)
        except TimeoutError:
            late = "no end in time"
            raise CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, late) from None
        finally:
            line.calls -= 1
            call.cancel()

    async def _open(self, watch: Watch) -> tuple[_Line, ClientCall]:
        """A call on a connection that is still there: of one that is not, nothing was sent."""
        while True:
            line = await self._line()
            try:
                return line, line.connection.open(GENERATE, self._metadata, watch.saw)
            except CallFailed:
                if line in self._lines:
                    self._lines.remove(line)

    async def _line(self) -> _Line:
        """The connection with the fewest calls; of several, the one that was chosen longest ago.

        Raises:
            CallFailed: no router can be reached.
        """
        self._connect_missing()
        while not self._lines:
            if not self._connecting:
                raise self._failure
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait(self._connecting.values(), return_when=first)
        line = min(self._lines, key=_calls)
        self._lines.remove(line)
        self._lines.append(line)
        return line

    def _connect_missing(self) -> None:
        """Begins to connect to routers without a connection that may be asked for one; to one more
        time to one of them if every connection has its fill."""
        now, reached = time.perf_counter(), {line.address for line in self._lines}
        for address in self._addresses:
            shunned = self._shunned.get(address, now) > now
            if not (address in reached or shunned or address in self._connecting):
                self._connecting[address] = asyncio.create_task(self._connect(address))
        if self._connecting or not self._lines or min(map(_calls, self._lines)) < CALLS_EACH:
            return
        address = min(self._lines, key=_calls).address
        self._connecting[address] = asyncio.create_task(self._connect(address))

    async def _connect(self, address: str) -> None:
        made = connected(address, LIMITS, CONNECT_SECONDS, self._tls)
        try:
            connection = await self._stack.enter_async_context(made)
        except CallFailed as error:
            self._shunned[address] = time.perf_counter() + SHUN_SECONDS
            self._failure = error
        else:
            self._lines.insert(0, _Line(address, connection))
        finally:
            del self._connecting[address]


def _calls(line: _Line) -> int:
    return line.calls


def _late(watch: Watch, due: float | None) -> float | None:
    return None if due is None or watch.sent is None else watch.sent - due


def _retry_seconds(error: CallFailed) -> float:
    """RetryInfo's; 0: there is none."""
    status, info = status_pb2.Status(), error_details_pb2.RetryInfo()
    try:
        status.ParseFromString(error.status)
    except DecodeError:
        return 0.0
    for detail in status.details:
        if detail.Unpack(info):
            delay = info.retry_delay
            return float(delay.seconds + delay.nanos / 1e9)
    return 0.0
