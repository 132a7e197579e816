"""Placement's decisions as the Operator service tells them."""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.v1 import operator_pb2
from router.placement import Candidate, Target
from router.placer import Explained


def explain_response(tenant: str, explained: Iterable[Explained]) -> operator_pb2.ExplainResponse:
    return operator_pb2.ExplainResponse(tenant=tenant, decisions=map(_decision, explained))


def _decision(explained: Explained) -> operator_pb2.PlacementDecision:
    return operator_pb2.PlacementDecision(
        completion_index=explained.index,
        attempt=explained.attempt,
        decided_at_seconds=explained.decided_at,
        prompt_tokens=explained.prompt_tokens,
        chosen=_candidate(explained.decision.chosen),
        losers=map(_candidate, explained.decision.losers),
        observed_ttft_seconds=explained.ttft_seconds,
        observed_tpot_seconds=explained.tpot_seconds,
    )


def _candidate(candidate: Candidate) -> operator_pb2.PlacementCandidate:
    plan = candidate.plan
    return operator_pb2.PlacementCandidate(
        prefill_worker=_name(plan.prefill),
        decode_worker=_name(plan.decode),
        whole_worker=_name(plan.whole),
        ttft_seconds=candidate.ttft_seconds,
        tpot_seconds=candidate.tpot_seconds,
        uncached_tokens=candidate.uncached_tokens,
        cost=candidate.cost,
    )


def _name(target: Target | None) -> str:
    return target.worker_id if target is not None else ""
