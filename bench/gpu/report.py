"""A session's results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.gpu.bars import GRPC, NCCL, NIXL, ONE, PREFILL, bars
from bench.gpu.results import Latency, Results
from bench.tables import table

FIRST = (PREFILL, ONE, NIXL, NCCL, GRPC)


def report(results: Results) -> str:
    """Every table that has a row."""
    parts = ["\n".join(f"- {name}: {said}" for name, said in results.about.items())]
    for title, rows in (
        ("Bars", _bars(results)),
        ("From agent to agent over NCCL, no engine beside", _agents(results)),
        ("Time to first token and to the second, ms", _latency(results)),
        ("Handoffs while prefill computes", _handoffs(results, results.latency)),
        ("Handoffs of prompts that prefill has in its cache", _handoffs(results, results.unhidden)),
        ("Decode steps while KV comes in", _steps(results)),
        ("KV blocks of layers on both sides after a handoff", _blocks(results)),
        ("A split's tokens against one engine's", _exact(results)),
        ("Held when all had ended", _ledgers(results)),
        ("Not available, and why", _missing(results)),
    ):
        if rows:
            parts.append(f"{title}:\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def _bars(results: Results) -> str:
    said = {True: "pass", False: "FAIL", None: "–"}
    rows = [[bar.name, bar.limit, bar.found, said[bar.met]] for bar in bars(results)]
    return table(["bar", "limit", "found", "verdict"], rows)


def _agents(results: Results) -> str:
    rows = []
    for row in results.agents:
        took, raw = row.took, results.find_raw(row.prompt)
        share = f"{took.gib_per_s / raw.gib_per_s:.0%}" if raw else ""
        moving = [f"{took.moving_ms:.2f}", f"{took.gib_per_s:.1f}", share]
        whole = [f"{took.whole_ms:.2f}", f"{took.cpu_ms:.1f}"]
        rows.append([str(row.prompt), str(took.mib), *moving, *whole])
    head = ["prompt", "MiB", "grant to landed ms", "GiB/s", "of raw"]
    return table([*head, "arrival to verdict ms", "CPU ms of both"], rows) if rows else ""


def _latency(results: Results) -> str:
    names = [name for name in FIRST if any(row.system == name for row in results.latency)]
    names += sorted({row.system for row in results.latency} - set(names))
    if not names:
        return ""
    rows = []
    for prompt in _prompts(results.latency):
        if raw := results.find_raw(prompt):
            rows.append([str(prompt), "a raw NCCL send of the KV", f"{raw.ms:.2f}", "", "", ""])
        for name in names:
            if row := results.find(name, prompt):
                span = f"{row.ttft_least_ms:.1f}–{row.ttft_most_ms:.1f}"
                times = [f"{row.ttft_ms:.1f}", span, _ms(row.second_ms), _ms(row.step_ms)]
                rows.append([str(prompt), name, *times])
    return table(["prompt", "system", "TTFT", "range", "2nd gap", "step"], rows)


def _handoffs(results: Results, source: Sequence[Latency]) -> str:
    rows = []
    for row in sorted(source, key=lambda row: (row.system, row.prompt)):
        if (crossed := row.handoff) is None:
            continue
        raw = results.find_raw(row.prompt)
        rows.append(
            [
                row.system,
                str(row.prompt),
                f"{crossed.mib:.1f}",
                f"{crossed.transfer_ms:.2f}",
                f"{crossed.gib_per_s:.2f}",
                f"{crossed.gib_per_s / raw.gib_per_s:.0%}" if raw else "",
                f"{crossed.exposed_ms:.2f}",
                f"{crossed.overlap:.0%}",
            ]
        )
    head = ["system", "prompt", "MiB", "transfer ms", "GiB/s", "of raw", "exposed ms", "overlap"]
    return table(head, rows) if rows else ""


def _steps(results: Results) -> str:
    rows = [
        [
            row.system,
            str(row.batch),
            str(row.context),
            f"{row.quiet_ms:.2f}",
            f"{row.receiving_ms:.2f}",
            f"{row.slowdown:+.1%}",
            f"{row.whole_slowdown:+.1%}",
            f"{row.receiving_steps}",
            f"{row.handoffs} × {row.mib:.0f} MiB",
        ]
        for row in results.steps
    ]
    head = ["system", "batch", "context", "quiet ms", "receiving ms", "slower"]
    head += ["with the requests' own steps", "steps", "handoffs"]
    return table(head, rows) if rows else ""


def _exact(results: Results) -> str:
    rows = [
        [
            row.pair,
            row.against,
            str(row.prompt),
            row.sampling,
            f"{row.same} of {row.tokens}",
            "" if row.gap_nats is None else f"{row.gap_nats:.4f}",
        ]
        for row in results.exact
    ]
    head = ["split", "against", "prompt", "sampling", "same tokens", "gap where they part, nats"]
    return table(head, rows) if rows else ""


def _blocks(results: Results) -> str:
    rows = [
        [
            row.pair,
            row.transport,
            str(row.prompt),
            row.sampling,
            str(row.compared),
            str(row.differing),
            row.first,
        ]
        for row in results.blocks
    ]
    head = ["split", "went over", "prompt", "sampling", "compared", "differ", "first: layer, block"]
    return table(head, rows) if rows else ""


def _ledgers(results: Results) -> str:
    rows = [[row.engine, str(row.entries), str(row.blocks)] for row in results.ledgers]
    return table(["engine", "ledger entries", "blocks"], rows) if rows else ""


def _missing(results: Results) -> str:
    return "\n".join(f"- {row.what}: {' '.join(row.why.split())}" for row in results.missing)


def _prompts(rows: Sequence[Latency]) -> list[int]:
    return sorted({row.prompt for row in rows})


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
