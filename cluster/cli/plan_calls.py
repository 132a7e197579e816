"""The CLI's calls about the plan; no protobuf type leaves this module."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
from google.protobuf.json_format import MessageToDict

from cluster.cli.calls import STATUS_SECONDS, grpc_errors
from pdserve.v1 import operator_pb2, operator_pb2_grpc

ORDER_SECONDS = 15.0

Values = dict[str, Any]
"""A message by its fields' names, as in operator.proto, the empty ones too."""


@dataclass(frozen=True)
class RequestSeen:
    """A request of the cluster, without its text. As `RequestRecord` in operator.proto."""

    at: float
    model: str
    slo_class: str
    prompt: int
    output: int
    blocks: tuple[int, ...]
    block_tokens: int


async def plan_view(to: grpc.aio.Channel) -> Values:
    """GetPlan. Raises PdserveError."""
    with grpc_errors():
        reply = await _stub(to).GetPlan(operator_pb2.GetPlanRequest(), timeout=STATUS_SECONDS)
    return _values(reply)


async def decisions(to: grpc.aio.Channel, model: str, limit: int) -> list[Values]:
    """ExplainPlan: newest first. Raises PdserveError."""
    request = operator_pb2.ExplainPlanRequest(model=model, limit=limit)
    with grpc_errors():
        reply = await _stub(to).ExplainPlan(request, timeout=STATUS_SECONDS)
    return list(_values(reply)["decisions"])


async def placements(to: grpc.aio.Channel, request_id: str, tenant: str) -> list[Values]:
    """Explain: why a request was placed so. Raises PdserveError."""
    request = operator_pb2.ExplainRequest(request_id=request_id, tenant=tenant)
    with grpc_errors():
        reply = await _stub(to).Explain(request, timeout=STATUS_SECONDS)
    return list(_values(reply)["decisions"])


async def scale(to: grpc.aio.Channel, model: str, role: str, workers: int) -> str:
    """What was done. Raises PdserveError, as do those below."""
    request = operator_pb2.ScaleRequest(model=model, role=role, workers=workers)
    with grpc_errors():
        reply = await _stub(to).Scale(request, timeout=ORDER_SECONDS)
    return str(reply.done)


async def flip(to: grpc.aio.Channel, worker_id: str, role: str) -> str:
    request = operator_pb2.FlipRequest(worker_id=worker_id, role=role)
    with grpc_errors():
        return str((await _stub(to).Flip(request, timeout=ORDER_SECONDS)).done)


async def drain(to: grpc.aio.Channel, worker_id: str) -> str:
    request = operator_pb2.DrainWorkerRequest(worker_id=worker_id)
    with grpc_errors():
        return str((await _stub(to).Drain(request, timeout=ORDER_SECONDS)).done)


async def set_targets(to: grpc.aio.Channel, slo_class: str, ttft: float, tpot: float) -> str:
    request = operator_pb2.SetTargetsRequest(
        slo_class=slo_class, ttft_seconds=ttft, tpot_seconds=tpot
    )
    with grpc_errors():
        return str((await _stub(to).SetTargets(request, timeout=ORDER_SECONDS)).done)


async def release_worker(to: grpc.aio.Channel, worker_id: str) -> str:
    return await _release(to, operator_pb2.ReleaseRequest(worker_id=worker_id))


async def release_pool(to: grpc.aio.Channel, model: str, role: str) -> str:
    pool = operator_pb2.HeldPool(model=model, role=role)
    return await _release(to, operator_pb2.ReleaseRequest(pool=pool))


async def release_targets(to: grpc.aio.Channel) -> str:
    return await _release(to, operator_pb2.ReleaseRequest(targets="all"))


async def release_everything(to: grpc.aio.Channel) -> str:
    return await _release(to, operator_pb2.ReleaseRequest(everything=True))


async def requests_seen(
    to: grpc.aio.Channel, past_seconds: float, follow: bool, timeout: float
) -> AsyncIterator[RequestSeen]:
    """The past of all routers, then what ends at this one, until `timeout` is over."""
    request = operator_pb2.RecordRequest(past_seconds=past_seconds, follow=follow)
    with grpc_errors():
        try:
            async for seen in _stub(to).Record(request, timeout=timeout):
                yield RequestSeen(
                    seen.at_seconds,
                    seen.model,
                    seen.slo_class,
                    seen.prompt_tokens,
                    seen.output_tokens,
                    tuple(seen.blocks),
                    seen.block_tokens,
                )
        except grpc.aio.AioRpcError as error:
            if not follow or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise


async def _release(to: grpc.aio.Channel, request: operator_pb2.ReleaseRequest) -> str:
    with grpc_errors():
        return str((await _stub(to).Release(request, timeout=ORDER_SECONDS)).done)


def _stub(to: grpc.aio.Channel) -> operator_pb2_grpc.OperatorStub:
    return operator_pb2_grpc.OperatorStub(to)


def _values(message: Any) -> Values:
    values = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return dict(_plain(values))


def _plain(value: Any) -> Any:
    """Numbers as numbers: protobuf's JSON writes large ones and infinity as text."""
    if isinstance(value, dict):
        return {k: int(v) if k in ("number", *_COUNTS) else _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if value in ("Infinity", "NaN"):
        return None
    return value if not isinstance(value, float) or math.isfinite(value) else None


_COUNTS = ("flips", "added", "removed")
