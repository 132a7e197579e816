"""The bars: what the handoff is held to, and whether a session's results reach it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.gpu.results import Latency, Results

PREFILL = "bare prefill"
ONE = "one vLLM"
NCCL = "pdserve nccl"
GRPC = "pdserve grpc"
NIXL = "vLLM NIXL"
PREFILL_ALONE = "pdserve, prefill's engine alone"
"""What a split must equal. Another process may have tuned its kernels otherwise, and then rounds
otherwise where it computes the same prompt itself, split or not."""

TTFT_OVER_PREFILL_MS = 5.0
EXPOSED_MS = 5.0
EXPOSED_PROMPT = 4096
RATE_SHARE = 0.8
RATE_MIB = 512
SLOWDOWN = 0.03
SECOND_STEPS = 2
SECOND_MS = 5.0
GRPC_EXPOSED_SHARE = 0.35


@dataclass(frozen=True)
class Bar:
    """A bar and what was found; `met` is None where it was not measured."""

    name: str
    limit: str
    found: str
    met: bool | None


def bars(results: Results) -> list[Bar]:
    """Every bar; one over several prompts is judged at its worst."""
    return [
        _worst(
            f"{NCCL}: TTFT over bare prefill", f"≤ {TTFT_OVER_PREFILL_MS:g} ms",
            _ttft_over_prefill(results), TTFT_OVER_PREFILL_MS, lambda v: f"{v:+.1f} ms",
        ),
        _worst(
            f"{NCCL}: exposed handoff wait at {EXPOSED_PROMPT} tokens", f"≤ {EXPOSED_MS:g} ms",
            _exposed(results), EXPOSED_MS, lambda v: f"{v:.1f} ms",
        ),
        _rate(results),
        _worst(
            f"{NCCL}: decode step while receiving", f"≤ {SLOWDOWN:+.0%}",
            [(row.slowdown, row.batch) for row in results.steps if row.system == NCCL],
            SLOWDOWN, lambda v: f"{v:+.1%}", "batch",
        ),
        _worst(
            f"{NCCL}: second-token gap over {SECOND_STEPS} decode steps", f"≤ {SECOND_MS:g} ms",
            _second(results), SECOND_MS, lambda v: f"{v:+.1f} ms",
        ),
        _worst(
            f"{GRPC}: exposed wait of the un-overlapped transfer", f"≤ {GRPC_EXPOSED_SHARE:.0%}",
            _grpc_share(results), GRPC_EXPOSED_SHARE, lambda v: f"{v:.0%}",
        ),
        *_exact(results),
        _ledgers(results),
    ]  # fmt: skip


Found = Sequence[tuple[float, int]]


def _worst(
    name: str,
    limit: str,
    found: Found,
    most: float,
    show: Callable[[float], str],
    at: str = "tokens",
) -> Bar:
    if not found:
        return Bar(name, limit, "not measured", None)
    value, where = max(found)
    where_said = f" at {at} {where}" if at == "batch" else f" at {where} {at}"
    return Bar(name, limit, show(value) + where_said, value <= most)


def _rows(results: Results, system: str) -> Iterator[Latency]:
    return (row for row in results.latency if row.system == system)


def _ttft_over_prefill(results: Results) -> Found:
    return [
        (row.ttft_ms - bare.ttft_ms, row.prompt)
        for row in _rows(results, NCCL)
        if (bare := results.find(PREFILL, row.prompt))
    ]


def _exposed(results: Results) -> Found:
    row = results.find(NCCL, EXPOSED_PROMPT)
    return [(row.handoff.exposed_ms, row.prompt)] if row and row.handoff else []


def _rate(results: Results) -> Bar:
    name, limit = f"{NCCL}: rate at {RATE_MIB} MiB, nothing hiding it", f"≥ {RATE_SHARE:.0%} of raw"
    for raw in results.raw:
        found = next((row for row in results.agents if row.prompt == raw.prompt), None)
        if round(raw.mib) == RATE_MIB and found is not None:
            rate = found.took.gib_per_s
            share = rate / raw.gib_per_s
            said = f"{share:.0%} ({rate:.1f} of {raw.gib_per_s:.1f} GiB/s)"
            return Bar(name, limit, said, share >= RATE_SHARE)
    return Bar(name, limit, "not measured", None)


def _second(results: Results) -> Found:
    return [
        (row.second_ms - SECOND_STEPS * one.step_ms, row.prompt)
        for row in _rows(results, NCCL)
        if (one := results.find(ONE, row.prompt))
        if row.second_ms is not None and one.step_ms is not None
    ]


def _grpc_share(results: Results) -> Found:
    return [
        (row.handoff.exposed_ms / alone.transfer_ms, row.prompt)
        for row in _rows(results, GRPC)
        if row.handoff and (alone := results.find_unhidden(GRPC, row.prompt))
    ]


def _exact(results: Results) -> Iterator[Bar]:
    rows = [row for row in results.exact if row.reshaped or row.against == PREFILL_ALONE]
    pairs = sorted({row.pair for row in rows})
    if not pairs:
        yield Bar("tokens of a split = tokens of one engine", "all", "not measured", None)
    for pair in pairs:
        mine = [row for row in rows if row.pair == pair]
        exact, excused = sum(r.exact for r in mine), sum(r.excused for r in mine)
        said = f"{exact} of {len(mine)}" + (f", {excused} part at a near tie" if excused else "")
        yield Bar(f"{pair}: tokens = one engine's", "all", said, exact + excused == len(mine))
    if results.blocks:
        differing = sum(row.differing for row in results.blocks)
        said = f"{differing} of {sum(row.compared for row in results.blocks)}"
        yield Bar("KV blocks that differ after a handoff", "0", said, differing == 0)
    if results.controls:
        differ = sum(control.differs for control in results.controls)
        yield Bar(
            "another first block gives other tokens",
            "all",
            f"{differ} of {len(results.controls)}",
            differ == len(results.controls),
        )


def _ledgers(results: Results) -> Bar:
    name, limit = "ledgers and blocks held afterwards", "0"
    if not results.ledgers:
        return Bar(name, limit, "not measured", None)
    held = sum(row.entries + row.blocks for row in results.ledgers)
    return Bar(name, limit, f"{held} on {len(results.ledgers)} engines", held == 0)
