"""The part of the Operator service that steers the pools: plans are read from the store, orders go
through it to the controller."""

from __future__ import annotations

from typing import Any

from cluster.errors import InvalidRequest, Unavailable
from cluster.rpc.call import Call
from cluster.store.plan_records import Order
from cluster.store.plans import KEPT_DECISIONS, Plans
from pdserve.v1 import operator_pb2, operator_pb2_grpc
from router.caller import shown_by
from router.client_wire import refuse_unknown_fields
from router.plan_wire import decision_message, plan_response
from router.recording import Recording
from router.refusal import refusing
from router.tenants import Tenants

ORDER_SECONDS = 10.0
"""The controller looks for orders every half second; it may be starting anew."""

DECISIONS = 20


class SteeringServicer(operator_pb2_grpc.OperatorServicer):
    """What people see of the plan and what they ask of it.

    Args:
        plans: None where there is no store to keep a plan.
        models: names, in the configuration's order.
    """

    def __init__(
        self, plans: Plans | None, tenants: Tenants, models: list[str], recording: Recording
    ) -> None:
        self._kept_plans = plans
        self._callers = tenants
        self._models = models
        self._recording = recording

    @refusing
    async def GetPlan(
        self, request: operator_pb2.GetPlanRequest, call: Call
    ) -> operator_pb2.GetPlanResponse:
        self._callers.check_operator(shown_by(call))
        refuse_unknown_fields(request)
        return plan_response(await self._plans().view())

    @refusing
    async def ExplainPlan(
        self, request: operator_pb2.ExplainPlanRequest, call: Call
    ) -> operator_pb2.ExplainPlanResponse:
        self._callers.check_operator(shown_by(call))
        refuse_unknown_fields(request)
        if request.limit > KEPT_DECISIONS:
            raise InvalidRequest("limit", f"must be at most {KEPT_DECISIONS}, not {request.limit}")
        model = request.model or (self._models[0] if len(self._models) == 1 else "")
        if model not in self._models:
            known = ", ".join(self._models)
            raise InvalidRequest("model", f"{model!r} is none; they are {known}")
        decisions = await self._plans().decisions(model, request.limit or DECISIONS)
        return operator_pb2.ExplainPlanResponse(decisions=map(decision_message, decisions))

    @refusing
    async def SetTargets(
        self, request: operator_pb2.SetTargetsRequest, call: Call
    ) -> operator_pb2.OrderResponse:
        order = Order(
            "targets",
            slo_class=request.slo_class,
            ttft_seconds=request.ttft_seconds,
            tpot_seconds=request.tpot_seconds,
        )
        return await self._ordered(request, call, order)

    @refusing
    async def Scale(
        self, request: operator_pb2.ScaleRequest, call: Call
    ) -> operator_pb2.OrderResponse:
        order = Order(
            "scale",
            model=request.model or (self._models[0] if len(self._models) == 1 else ""),
            role=request.role,
            workers=request.workers,
        )
        return await self._ordered(request, call, order)

    @refusing
    async def Flip(
        self, request: operator_pb2.FlipRequest, call: Call
    ) -> operator_pb2.OrderResponse:
        order = Order("flip", worker_id=request.worker_id, role=request.role)
        return await self._ordered(request, call, order)

    @refusing
    async def Drain(
        self, request: operator_pb2.DrainWorkerRequest, call: Call
    ) -> operator_pb2.OrderResponse:
        return await self._ordered(request, call, Order("drain", worker_id=request.worker_id))

    @refusing
    async def Release(
        self, request: operator_pb2.ReleaseRequest, call: Call
    ) -> operator_pb2.OrderResponse:
        match request.WhichOneof("what"):
            case "worker_id":
                order = Order("release", worker_id=request.worker_id)
            case "pool":
                order = Order("release", model=request.pool.model, role=request.pool.role)
            case "targets":
                order = Order("release", slo_class=request.targets or "all")
            case "everything":
                order = Order("release", everything=request.everything)
            case _:
                raise InvalidRequest("what", "say what to release")
        return await self._ordered(request, call, order)

    async def Record(self, request: operator_pb2.RecordRequest, call: Call) -> None:
        await self._recording.serve(request, call, self._callers)

    async def _ordered(self, request: Any, call: Call, order: Order) -> operator_pb2.OrderResponse:
        self._callers.check_steering(shown_by(call))
        refuse_unknown_fields(request)
        done = await self._plans().order(order, ORDER_SECONDS)
        return operator_pb2.OrderResponse(done=done)

    def _plans(self) -> Plans:
        if self._kept_plans is None:
            raise Unavailable("this router has no store, and so no plan")
        return self._kept_plans
