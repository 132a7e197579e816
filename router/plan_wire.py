"""The plan as the Operator service tells it."""

from __future__ import annotations

from cluster.store.plan_records import DecisionRecord, ModelPlan, PlanView
from pdserve.v1 import operator_pb2


def plan_response(view: PlanView | None) -> operator_pb2.GetPlanResponse:
    if view is None:
        return operator_pb2.GetPlanResponse()
    return operator_pb2.GetPlanResponse(
        mode=view.mode, at_seconds=view.at, models=map(_model, view.models)
    )


def _model(plan: ModelPlan) -> operator_pb2.ModelPlan:
    return operator_pb2.ModelPlan(
        model=plan.model,
        serving=plan.serving,
        wanted=plan.wanted,
        manual=plan.manual,
        drained_workers=plan.drained,
        targets={
            name: operator_pb2.ClassTargets(**targets) for name, targets in plan.targets.items()
        },
        attainment=plan.attainment,
        prediction_errors=plan.errors,
        performance=plan.performance,
        done=plan.done,
        decision=None if plan.decision is None else decision_message(plan.decision),
    )


def decision_message(decision: DecisionRecord) -> operator_pb2.PlanDecision:
    return operator_pb2.PlanDecision(
        number=decision.number,
        at_seconds=decision.at,
        model=decision.model,
        source=decision.source,
        acted=decision.acted,
        have=decision.have,
        target=decision.target,
        needed=decision.needed,
        actions=[
            operator_pb2.PlanAction(
                kind=action.kind,
                worker_id=action.worker_id,
                role=action.role,
                node_type=action.node_type,
                reason=action.reason,
            )
            for action in decision.actions
        ],
        held=decision.held,
        reasons=decision.reasons,
        shortfalls=[
            operator_pb2.PlanShortfall(
                slo_class=each.kind,
                metric=each.metric,
                target_seconds=each.target,
                predicted=each.predicted,
                excess_seconds=each.excess,
            )
            for each in decision.shortfalls
        ],
        inputs=decision.inputs,
    )
