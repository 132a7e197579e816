"""The results as Markdown tables, which read well in a terminal too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MIB = 1 << 20


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w - 1)}:" if i else "-" * w for i, w in enumerate(widths)]
    return "\n".join([line(head), f"| {' | '.join(rule)} |", *map(line, rows)])


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def startup_table(startup: dict[str, Any]) -> str:
    rows = [["the CLI's first line", "", f"{startup['first_line_seconds']:.1f}"]]
    for part in startup["parts"]:
        rows.append(
            [part["part"], f"{part['own_seconds']:.1f}", f"{part['after_seconds']:.1f}"],
        )
    rows.append(["ready to serve", "", f"{startup['ready_seconds']:.1f}"])
    return table(["start-up", "own s", "after s"], rows)


def memory_table(memory: Sequence[dict[str, Any]]) -> str:
    rows = []
    for entry in memory:
        pss = "?" if entry["pss"] is None else f"{entry['pss'] / MIB:.0f}"
        own = f"{entry['rss_ready'] / MIB:.0f}" if entry["rss_ready"] else ""
        name = f"{entry['part']}: {entry['process']}"
        rows.append([name, own, f"{entry['rss'] / MIB:.0f}", pss, f"{100 * entry['idle_cpu']:.1f}"])
    return table(["memory, MiB", "RSS at ready", "RSS after load", "PSS", "idle CPU %"], rows)


def latency_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        cells = [str(row["prompt_tokens"])]
        for name in ("ttft", "tpot", "total"):
            cells += [
                f"{row[f'{name}_cluster_ms']:.1f}",
                f"{row[f'{name}_vllm_ms']:.1f}",
                ratio(row[f"{name}_ratio"]),
            ]
        cells += [f"{row['handoff_wait_ms']:.1f}", f"{row['handoff_bytes'] / 1024:.0f}"]
        lines.append(cells)
    head = ["prompt", "TTFT ms", "vLLM", "ratio", "TPOT ms", "vLLM", "ratio"]
    return table([*head, "total ms", "vLLM", "ratio", "handoff wait ms", "handoff KiB"], lines)


def phase_table(rows: Sequence[dict[str, Any]]) -> str:
    """The router's phases, and what of the TTFT lies outside them."""
    names = ("queue", "prefill_queue", "prefill", "handoff_wait", "decode_queue", "first_step")
    lines = []
    for row in rows:
        outside = row["ttft_cluster_ms"] - sum(row[f"{name}_ms"] for name in names[:3])
        cells = [f"{row[f'{name}_ms']:.1f}" for name in names]
        lines.append(
            [str(row["prompt_tokens"]), *cells, f"{outside:.1f}", ratio(row["second_ratio"])]
        )
    spoken = [name.replace("_", " ") for name in names]
    return table(["prompt, ms", *spoken, "TTFT outside", "2nd token, ratio"], lines)


def load_table(row: dict[str, Any]) -> str:
    lines = []
    kinds = (("tokens/s", "tokens_per_second", ""), ("TTFT ms", "ttft", "_ms"))
    for title, name, unit in (*kinds, ("TPOT ms", "tpot", "_ms")):
        values = [row[f"{name}_{system}{unit}"] for system in ("cluster", "vllm")]
        lines.append([title, *(f"{v:.1f}" for v in values), ratio(row[f"{name}_ratio"])])
    title = f"{row['concurrency']} at once, {row['prompt_tokens']} tokens"
    return table([title, "cluster", "vLLM", "ratio"], lines)
