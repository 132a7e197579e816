"""The answer's four plots: ratio, frontier, TTFT by prompt length, roofline."""

from __future__ import annotations

from cluster.advisor.advice import Advice
from cluster.advisor.evaluate import Verdict
from cluster.advisor.svg import Axis, Series, chart
from cluster.planner.calibrate import quantile

SHOWN = 5


def plots(advice: Advice) -> dict[str, str]:
    """SVG documents by file name."""
    return {
        "goodput.svg": _goodput(advice),
        "frontier.svg": _frontier(advice),
        "ttft-by-prompt.svg": _ttft_by_prompt(advice),
        "roofline.svg": _roofline(advice),
    }


def _goodput(advice: Advice) -> str:
    splits = sorted(
        (v for v in advice.verdicts if not v.option.both), key=lambda v: v.option.prefill
    )
    series = [
        Series("90 % goal", [(v.option.prefill, v.goodput) for v in splits]),
        Series("99 %", [(v.option.prefill, v.goodput99) for v in splits]),
    ]
    if splits and (whole := [v for v in advice.verdicts if v.option.both]):
        ends = (splits[0].option.prefill, splits[-1].option.prefill)
        series.append(Series("aggregated", [(x, whole[0].goodput) for x in ends]))
    series[0] = Series(f"{advice.question.goal.share:.0%} goal", series[0].points)
    workers = advice.question.gpus // advice.question.performance.gpus
    return chart(
        f"Goodput over the ratio: {advice.question.shape.name}, {workers} workers",
        Axis(f"prefill workers of {workers}"),
        Axis("goodput, requests/s"),
        series,
    )


def _frontier(advice: Advice) -> str:
    """What can be promised together, as the rate grows."""
    series = []
    for verdict in advice.verdicts[:SHOWN]:
        points = []
        for point in verdict.curve:
            first, gap = point.percentiles()
            points.append((first.p90, gap.p90 * 1e3))
        series.append(Series(str(verdict.option), points))
    return chart(
        "P90 TTFT and TPOT as the rate grows",
        Axis("P90 TTFT, s", log=True),
        Axis("P90 TPOT, ms"),
        series,
    )


def _ttft_by_prompt(advice: Advice) -> str:
    series = [
        Series(str(verdict.option), _by_prompt(verdict)) for verdict in advice.verdicts[:SHOWN]
    ]
    return chart(
        "P90 TTFT by prompt length, near each option's goodput",
        Axis("prompt tokens", log=True),
        Axis("P90 TTFT, s", log=True),
        series,
    )


def _by_prompt(verdict: Verdict) -> list[tuple[float, float]]:
    if not verdict.curve:
        return []
    point = min(verdict.curve, key=lambda p: abs(p.rate - verdict.goodput))
    ordered = sorted((prompt, first) for first, _, prompt in point.requests)
    size = max(1, len(ordered) // 8)
    buckets = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [
        (bucket[len(bucket) // 2][0], quantile(sorted(first for _, first in bucket), 0.9))
        for bucket in buckets
    ]


def _roofline(advice: Advice) -> str:
    """FLOP per byte read, and FLOP/s: the ceiling, prefills by length, decodes by batch."""
    question = advice.question
    shape, worker, gpus = question.shape, question.performance, question.performance.gpus
    peak, bandwidth = question.hardware.flops * gpus, question.hardware.bandwidth * gpus
    intensities = [2.0**k for k in range(13)]
    ceiling = [(i, min(peak, bandwidth * i) / 1e12) for i in intensities]
    prefill = []
    for tokens in (128, 512, 2048, 8192):
        flops = shape.prefill_flops(tokens)
        read = shape.weight_bytes + tokens * shape.kv_bytes_per_token
        prefill.append((flops / read, flops / worker.prefill_seconds(tokens) / 1e12))
    held = sum(a.prompt + a.output / 2 for a in question.arrivals)
    context = round(held / len(question.arrivals))
    decode = []
    for batch in (1, 4, 16, 64, 256):
        flops = shape.decode_flops(batch, batch * context)
        seconds = worker.decode_seconds(batch, batch * context)
        decode.append((flops / shape.decode_bytes(batch * context), flops / seconds / 1e12))
    return chart(
        f"Roofline of {gpus} × {question.hardware.name}, {shape.name}",
        Axis("FLOP per byte", log=True),
        Axis("TFLOP/s", log=True),
        [
            Series("peak", ceiling),
            Series("prefill, 128–8k tokens", prefill),
            Series(f"decode at {context} tokens, batch 1–256", decode),
        ],
    )
