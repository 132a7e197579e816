"""The CLI's gRPC calls; no protobuf type leaves this module."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import grpc
import grpc.aio

from cluster.cli.timeline import PHASES, Handoff, Served
from cluster.errors import PdserveError, Unavailable, error_from_code
from pdserve.v1 import (
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    operator_pb2,
    operator_pb2_grpc,
)

STATUS_SECONDS = 10.0
_NO_SERVER = ("failed to connect", "DNS resolution failed", "errors resolving")
_CREDENTIALS = "; they are PDSERVE_TOKEN's, without which the cluster's host has its own"
_NO_CREDENTIALS = "; PDSERVE_TOKEN is not set"


@dataclass(frozen=True)
class Prompt:
    """What to generate from: `chat` as (role, content), or `text`. None takes the default."""

    text: str = ""
    chat: tuple[tuple[str, str], ...] = ()
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class Delta:
    """New text of the completion."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = ""


@dataclass(frozen=True)
class WorkerView:
    """A worker as the router sees it. Names as in operator.proto; tokens are those of `done`, None
    where it did not say."""

    worker_id: str
    model: str
    role: str
    state: str
    connected: bool
    running_sequences: int
    pinned_blocks: int
    pinned_bytes: int
    engine_blocks_used: int
    engine_blocks_total: int
    resident_bytes: int
    transport: str
    address: str
    incarnation: str
    detail: str
    ejected: bool = False
    waiting_sequences: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True)
class Quantiles:
    """Seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class ServedLately:
    """What became of the latest requests. As in operator.proto."""

    seconds: float
    requests: int
    attained: int
    missed: dict[str, int]
    ttft_seconds: Quantiles | None
    tpot_seconds: Quantiles | None


@dataclass(frozen=True)
class RouterView:
    """A router. Names as in operator.proto.

    Attributes:
        running_requests, queued_requests, lately: of a router that answered for itself; of others
            None and empty.
    """

    router_id: str
    grpc_address: str
    http_address: str
    operator_address: str
    running_requests: int | None
    queued_requests: dict[str, int] = field(default_factory=dict)
    lately: ServedLately | None = None


@dataclass(frozen=True)
class ClusterView:
    """The cluster now."""

    cluster: str
    store_reachable: bool
    workers: tuple[WorkerView, ...] = field(default=())
    routers: tuple[RouterView, ...] = field(default=())


async def generate(to: grpc.aio.Channel, prompt: Prompt) -> AsyncIterator[Delta | Served]:
    """Streams text; the last item is how it was served.

    Raises:
        PdserveError: as the router said it.
    """
    request = inference_pb2.GenerateRequest(model=prompt.model, sampling=_sampling(prompt))
    if prompt.chat:
        request.chat.messages.extend(
            inference_pb2.ChatMessage(role=role, content=content) for role, content in prompt.chat
        )
    else:
        request.text = prompt.text
    stub = inference_pb2_grpc.InferenceStub(to)
    with grpc_errors():
        async for response in stub.Generate(request, timeout=prompt.timeout_seconds):
            if response.HasField("delta"):
                delta = response.delta
                finish = common_pb2.FinishReason.Name(delta.finish_reason)
                finish = finish.removeprefix("FINISH_REASON_").lower()
                yield Delta(
                    delta.text, tuple(delta.token_ids), "" if finish == "unspecified" else finish
                )
            elif response.HasField("completed"):
                yield _served(response.completed)


async def cluster_view(
    to: grpc.aio.Channel, timeout: float = STATUS_SECONDS, router_only: bool = False
) -> ClusterView:
    """GetCluster. Raises PdserveError.

    Args:
        router_only: of the router that answers alone.
    """
    request = operator_pb2.GetClusterRequest(router_only=router_only)
    stub = operator_pb2_grpc.OperatorStub(to)
    with grpc_errors():
        reply = await stub.GetCluster(request, timeout=timeout)
    workers = tuple(
        WorkerView(
            worker_id=w.worker_id,
            model=w.model,
            role=w.role,
            state=w.state,
            connected=w.connected,
            running_sequences=w.running_sequences,
            waiting_sequences=w.waiting_sequences,
            prompt_tokens=w.done.prompt_tokens if w.HasField("done") else None,
            output_tokens=w.done.output_tokens if w.HasField("done") else None,
            pinned_blocks=w.pinned_blocks,
            pinned_bytes=w.pinned_bytes,
            engine_blocks_used=w.engine_blocks_used,
            engine_blocks_total=w.engine_blocks_total,
            resident_bytes=sum(w.resident_bytes.values()),
            transport=w.transport,
            address=w.address,
            incarnation=w.incarnation,
            ejected=w.ejected,
            detail=w.detail,
        )
        for w in reply.workers
    )
    routers = tuple(
        RouterView(
            r.router_id,
            r.grpc_address,
            r.http_address,
            r.operator_address,
            r.running_requests if r.HasField("running_requests") else None,
            dict(r.queued_requests),
            _lately(r.lately) if r.HasField("lately") else None,
        )
        for r in reply.routers
    )
    return ClusterView(reply.cluster, reply.store_reachable, workers, routers)


def _lately(served: operator_pb2.ServedLately) -> ServedLately:
    def quantiles(name: Literal["ttft_seconds", "tpot_seconds"]) -> Quantiles | None:
        if not served.HasField(name):
            return None
        of = getattr(served, name)
        return Quantiles(of.p50, of.p90, of.p99)

    return ServedLately(
        served.seconds,
        served.requests,
        served.attained,
        dict(served.missed),
        quantiles("ttft_seconds"),
        quantiles("tpot_seconds"),
    )


def _sampling(prompt: Prompt) -> common_pb2.SamplingParams:
    sampling = common_pb2.SamplingParams()
    if prompt.max_tokens is not None:
        sampling.max_tokens = prompt.max_tokens
    if prompt.temperature is not None:
        sampling.temperature = prompt.temperature
    if prompt.seed is not None:
        sampling.seed = prompt.seed
    return sampling


def _served(completed: inference_pb2.Completed) -> Served:
    report = completed.completions[0]
    handoff = None
    if report.HasField("handoff"):
        moved = report.handoff
        handoff = Handoff(
            moved.transport,
            moved.bytes,
            moved.blocks,
            moved.messages,
            moved.held_tokens,
            moved.transfer_seconds,
        )
    return Served(
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        phases={name: getattr(report.phases, f"{name}_seconds") for name in PHASES},
        handoff=handoff,
        ttft_seconds=report.ttft_seconds,
        tpot_seconds=report.tpot_seconds,
        prompt_tokens=completed.usage.prompt_tokens,
        cached_tokens=completed.usage.cached_prompt_tokens,
        output_tokens=completed.usage.completion_tokens,
    )


@contextmanager
def grpc_errors() -> Iterator[None]:
    """Turns a call's failure into the error that the router meant."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        details = error.details() or error.code().name
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            details += _CREDENTIALS if os.environ.get("PDSERVE_TOKEN") else _NO_CREDENTIALS
        if error.code() is grpc.StatusCode.UNAVAILABLE and details.startswith(_NO_SERVER):
            raise Unavailable(
                "no router answers at this address: check --address; without it, routers are "
                "starting anew, as `pdserve up` shows; one with router.tls needs PDSERVE_CA_FILE, "
                "one without it none"
            ) from error
        code = error.code().value[0]
        failure: PdserveError = error_from_code(code, details, retryable=False)
        raise failure from error
