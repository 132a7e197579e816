"""Decisions in words, and the figures that they rest on."""

from __future__ import annotations

import math

from cluster.planner.capacity import Load
from cluster.planner.state import Observed, Shortfall


def spoken_load(load: Load) -> str:
    if not load.rate:
        return "no traffic is expected"
    return (
        f"expected: {load.rate:.2f} requests/s, {load.prefill_work:.2f} workers' worth of "
        f"prefill, {load.output_rate:.0f} output tokens/s"
    )


def inputs_of(load: Load, observed: Observed) -> dict[str, float]:
    inputs = {
        "rate_expected": load.rate,
        "prefill_work": load.prefill_work,
        "output_rate": load.output_rate,
        "queued_prompt_tokens": observed.queued_prompt_tokens,
    }
    for kind, traffic in observed.traffic.items():
        inputs[f"rate_seen/{kind or 'all'}"] = traffic.rate
    return inputs


def spoken_shortfall(each: Shortfall) -> str:
    by = "without end" if math.isinf(each.excess) else f"by {each.excess:.3g} s"
    return (
        f"{each.metric} ≤ {each.target:g} s of {each.kind or 'all requests'} is out of reach of "
        f"the budget: missed {by}, {each.predicted:.1%} would meet their targets"
    )
