"""An answer as plain values, for JSON."""

from __future__ import annotations

import math
from typing import Any

from cluster.advisor.advice import Advice
from cluster.planner.efficiency import Cost, tokens_per_second_per_user
from cluster.simulator.outcome import Percentiles


def report(advice: Advice) -> dict[str, Any]:
    """Seconds, requests/s and dollars; null where there is no value."""
    question = advice.question
    return {
        "model": question.shape.name,
        "gpu": question.hardware.name,
        "gpus": question.gpus,
        "performance": question.performance.label,
        "targets": {
            "ttft": _finite(question.goal.targets.ttft),
            "tpot": _finite(question.goal.targets.tpot),
            "share": question.goal.share,
        },
        "floor": {"ttft": advice.floor.ttft, "tpot": advice.floor.tpot},
        "trace": {"requests": len(question.arrivals), "rate": advice.rate},
        "best": str(advice.best.option),
        "second_loses": advice.second_loses,
        "options": [
            {
                "option": str(verdict.option),
                "prefill": verdict.option.prefill,
                "decode": verdict.option.decode,
                "both": verdict.option.both,
                "goodput": verdict.goodput,
                "goodput99": verdict.goodput99,
                "rough": verdict.rough,
                "attainment_at_trace_rate": verdict.attainment,
                "ttft": _percentiles(verdict.ttft),
                "tpot": _percentiles(verdict.tpot),
                "tokens_per_second_per_user": tokens_per_second_per_user(verdict.tpot.p50),
                "dollars_per_request": _cost(cost),
                "curve": [
                    {"rate": p.rate, "attainment": p.attainment(question.goal.targets)}
                    for p in verdict.curve
                ],
            }
            for verdict, cost in zip(advice.verdicts, advice.costs, strict=True)
        ],
        "sensitivity": [
            {
                "change": each.change,
                "best": str(each.best),
                "goodput": each.goodput,
                "goodput_of_advised": each.kept,
            }
            for each in advice.sensitivity
        ],
    }


def _percentiles(values: Percentiles) -> dict[str, float | None]:
    return {name: _finite(getattr(values, name)) for name in ("p50", "p90", "p99")}


def _cost(cost: Cost) -> dict[str, float | None]:
    return {
        "prefill": _finite(cost.prefill),
        "decode": _finite(cost.decode),
        "total": _finite(cost.total),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
