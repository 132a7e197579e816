"""The client of `pdserve bench`: connections to a router, requests over them, what came when.

Over `cluster.rpc` and not grpc.aio: a client takes a core, too, and one that takes several times
as much for a message measures itself several times as soon.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from cluster.cli import access
from cluster.cli.bench_seen import Answered, Seen
from cluster.cli.calls import grpc_errors
from cluster.cli.timeline import PHASES
from cluster.errors import NotFound, Unavailable
from cluster.rpc.client import CallFailed, ClientConnection, connected
from cluster.rpc.limits import Limits
from cluster.simulator.outcome import Targets
from pdserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

LIMITS = Limits(message_bytes=access.MAX_MESSAGE_BYTES, calls=0)
GENERATE = f"/{inference_pb2.DESCRIPTOR.services_by_name['Inference'].full_name}/Generate"
CONNECT_SECONDS = 10.0
LATE_SECONDS = 2.0
"""After a request's deadline; the router ends it at the deadline itself."""
CALLS_EACH = 128
"""On a connection, before another one is opened."""


@dataclass
class Meter:
    """Counts what comes while it is open.

    Attributes:
        prompt_tokens: of prompts whose first token came.
    """

    open: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Served:
    """A model of the cluster, as ListModels has it."""

    name: str
    vocab: int
    max_model_len: int


async def served_model(address: str, name: str) -> Served:
    """The one called `name`, or the first.

    Raises:
        NotFound: there is none of that name.
        Unavailable: it cannot be served now.
    """
    async with access.channel(address) as to:
        stub = inference_pb2_grpc.InferenceStub(to)
        with grpc_errors():
            reply = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)
    found = [model for model in reply.models if name in ("", model.name)]
    if not found:
        known = ", ".join(model.name for model in reply.models)
        raise NotFound(f"--model: the cluster serves {known}, not {name!r}")
    model = found[0]
    if not model.ready:
        raise Unavailable(f"{model.name} cannot be served now: see `pdserve status`")
    return Served(model.name, model.vocab_size, model.max_model_len)


@dataclass
class _Line:
    connection: ClientConnection
    calls: int = 0


class Client:
    """Sends requests to a router. An async context manager.

    Args:
        timeout: seconds, a request's deadline.
        meter: hears of tokens.
    """

    def __init__(self, address: str, timeout: float, meter: Meter) -> None:
        self._address = address
        self._timeout = timeout
        self._meter = meter
        self._tls = access.tls()
        deadline = ("grpc-timeout", f"{max(1, round(timeout * 1000))}m")
        self._metadata = (deadline, *access.credentials())
        self._lines: list[_Line] = []
        self._connecting = asyncio.Lock()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ask(
        self, request: inference_pb2.GenerateRequest, due: float | None = None
    ) -> tuple[Seen, float]:
        """Sends it, and waits for its end.

        Args:
            due: when it was to be sent, of `time.perf_counter`.

        Returns:
            What became of it, and after how many seconds a refused one may come again.
        """
        message = request.SerializeToString()
        prompt, output = len(request.token_ids.ids), request.sampling.max_tokens
        sent = time.perf_counter()
        late = 0.0 if due is None else sent - due
        watch = Watch(sent, prompt, output, self._meter)
        try:
            await self._call(message, watch)
        except CallFailed as error:
            refused = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            reason = error.details if refused else f"{error.code.name}: {error.details}"
            end = Seen(prompt, output, "refused" if refused else "failed", late, reason)
            return end, _retry_seconds(error)
        answered, wrong = watch.end()
        if wrong:
            return Seen(prompt, output, "failed", late, wrong), 0.0
        return Seen(prompt, output, "ok", late, answered=answered), 0.0

    async def _call(self, message: bytes, watch: Watch) -> None:
        line = await self._line()
        try:
            call = line.connection.open(GENERATE, self._metadata, watch.saw)
        except CallFailed:
            if line in self._lines:
                self._lines.remove(line)
            raise
        line.calls += 1
        try:
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

    async def _line(self) -> _Line:
        """The connection with the fewest calls, or a new one."""
        async with self._connecting:
            line = min(self._lines, key=lambda each: each.calls, default=None)
            if line is None or line.calls >= CALLS_EACH:
                made = connected(self._address, LIMITS, CONNECT_SECONDS, self._tls)
                line = _Line(await self._stack.enter_async_context(made))
                self._lines.append(line)
            return line


class Watch:
    """One request's messages as they come.

    Args:
        sent: when it was sent, of `time.perf_counter`.
        prompt, output: its tokens, and those that are to come.
    """

    def __init__(self, sent: float, prompt: int, output: int, meter: Meter) -> None:
        self._sent = sent
        self._prompt = prompt
        self._output = output
        self._meter = meter
        self._first = self._last = 0.0
        self._tokens = 0
        self._gaps = array("d")
        self._wrong = ""
        self._completed: inference_pb2.Completed | None = None

    def saw(self, message: bytes) -> None:
        """A GenerateResponse."""
        try:
            response = inference_pb2.GenerateResponse.FromString(message)
        except DecodeError:
            self._wrong = "a message could not be read"
            return
        if response.HasField("completed"):
            self._completed = response.completed
            return
        delta = response.delta
        count = len(delta.token_ids)
        if not count:
            return
        now = time.perf_counter()
        if delta.offset != self._tokens:
            self._wrong = "tokens were lost or repeated"
        meter = self._meter
        if self._tokens:
            self._gaps.append(now - self._last)
            self._gaps.extend((0.0,) * (count - 1))
        else:
            self._first = now
            self._gaps.extend((0.0,) * (count - 1))
            meter.prompt_tokens += self._prompt * meter.open
        self._last = now
        self._tokens += count
        meter.output_tokens += count * meter.open

    def end(self) -> tuple[Answered | None, str]:
        """The call is over: what it came to, or what was wrong with it."""
        ended = time.perf_counter()
        done = self._completed
        if done is None or not done.completions:
            return None, "the stream ended without its report"
        if self._wrong or self._tokens != self._output:
            return None, self._wrong or f"{self._tokens} tokens came, not {self._output}"
        report = done.completions[0]
        return (
            Answered(
                report.ttft_seconds,
                report.tpot_seconds,
                self._first - self._sent,
                ended - self._sent,
                self._gaps,
                done.usage.cached_prompt_tokens,
                tuple(getattr(report.phases, f"{name}_seconds") for name in PHASES),
                report.handoff.bytes if report.HasField("handoff") else None,
            ),
            "",
        )


def request_of(
    model: str, ids: list[int], output: int, slo_class: str, salt: str, own: Targets | None
) -> inference_pb2.GenerateRequest:
    """One whose answer has exactly `output` tokens; `own`: targets in place of its class's."""
    request = inference_pb2.GenerateRequest(
        model=model,
        token_ids=inference_pb2.TokenIds(ids=ids),
        sampling=common_pb2.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
        slo_class=f"SLO_CLASS_{slo_class.upper()}",
        cache_salt=salt,
    )
    for name in ("ttft", "tpot"):
        if own is not None and math.isfinite(seconds := getattr(own, name)):
            setattr(request.targets, f"{name}_seconds", seconds)
    return request


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
