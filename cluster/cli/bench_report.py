"""What `pdserve bench` says at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.cli.bench_seen import SHARES, Run, Spread, goodput
from cluster.cli.timeline import bar, spoken_bytes

MOST_REASONS = 5
_NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "client_ttft": "TTFT, client's",
    "itl": "ITL, client's",
    "e2e": "E2E, client's",
}


def values(addresses: Sequence[str], model: str, runs: Sequence[Run]) -> dict[str, Any]:
    """For `--json`."""
    found = {f"{share:.0%}": goodput(runs, share) for share in SHARES}
    return {
        "addresses": list(addresses),
        "model": model,
        "runs": [run.values() for run in runs],
        "goodput_requests_per_second": found if _goodput_is_known(runs) else None,
    }


def show(out: Console, addresses: Sequence[str], model: str, runs: Sequence[Run]) -> None:
    """Each run, and with several of them their table and the goodput."""
    for run in runs:
        _show_run(out, ", ".join(addresses), model, run)
    if len(runs) > 1:
        out.print(_rates(runs))
    if _goodput_is_known(runs):
        _show_goodput(out, runs)


def _show_run(out: Console, at: str, model: str, run: Run) -> None:
    out.print(f"[bold]{model}[/] at {at}: {run.load}", highlight=False)
    cut = f"; {run.cut} under way were cut off and not counted" if run.cut else ""
    early = "interrupted after " if run.interrupted else ""
    out.print(
        f"{early}{run.seconds:.1f} s: {len(run.seen)} requests came "
        f"({run.per_second(len(run.seen)):.2f}/s): {run.count('ok')} ok, "
        f"{run.count('refused')} refused, {run.count('failed')} failed{cut}",
        markup=False,
    )
    for (end, why), times in run.reasons().most_common(MOST_REASONS):
        out.print(f"  {times} × {end}: {why}", markup=False)
    if run.count("ok"):
        out.print(
            f"tokens/s: prompt {run.per_second(run.prompt_tokens):,.0f}, output "
            f"{run.per_second(run.output_tokens):,.0f}; prefix caches held "
            f"{run.cached_share:.0%} of the prompts",
            markup=False,
        )
        out.print(_latencies(run))
    if run.attainment is not None:
        out.print(
            f"{run.attainment:.1%} of all {run.with_targets}{_but_those(run)} had "
            f"{_targets(run)}: {run.per_second(run.attained):.2f} requests/s",
            markup=False,
        )
    if run.count("ok"):
        _show_phases(out, run)
    _show_client(out, run)
    out.print()


def _but_those(run: Run) -> str:
    without = len(run.seen) - run.with_targets
    return f" that have targets ({without} have none)" if without else ""


def _targets(run: Run) -> str:
    """The same for all, or by class."""
    different = set(run.targets.values())
    if len(different) == 1:
        return str(*different)
    return "; ".join(f"{slo_class}: {each}" for slo_class, each in run.targets.items())


def _latencies(run: Run) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms", no_wrap=True)
    for column in ("p50", "p90", "p99", "mean"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, spread in run.spreads().items():
        of = spread.percentiles
        table.add_row(_NAMES[name], *(_ms(each) for each in (of.p50, of.p90, of.p99, spread.mean)))
    return table


def _show_phases(out: Console, run: Run) -> None:
    phases = run.phases()
    whole = sum(phases.values()) or 1.0
    out.print("where the mean request's time went:")
    for name, seconds in phases.items():
        line = f"  {name:<14}{seconds * 1e3:9.1f} ms {seconds / whole:5.0%}  {bar(seconds / whole)}"
        out.print(line.rstrip(), markup=False)
    ok, moved = run.count("ok"), ""
    if run.split:
        moved = f", each of which moved {spoken_bytes(round(run.moved_bytes / run.split))} of KV"
    out.print(f"{run.split} of {ok} were split over prefill and decode{moved}", markup=False)


def _show_client(out: Console, run: Run) -> None:
    client = run.client
    requests = ""
    if client.requests_p99 is not None:
        requests = f"requests were sent {client.requests_p99 * 1e3:.1f} ms late (p99), "
    said = (
        f"its turns came {client.turns_p99 * 1e3:.1f} ms late "
        f"(p99, {client.turns_most * 1e3:.0f} ms at most), {requests}"
        f"and it took {client.core_share:.0%} of a core"
    )
    if client.was_the_bottleneck:
        out.print("[bold red]the client was the bottleneck:[/]", end=" ")
        out.print(
            f"{said}: these figures are its own as much as the cluster's. Ask for less, or from a "
            "machine that has a core for it",
            markup=False,
        )
    else:
        out.print(f"the client kept up: {said}", markup=False)


def _rates(runs: Sequence[Run]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = (
        "requests/s", "ok", "refused", "failed", "attained", "TTFT ms p50/99", "TPOT ms p50/99",
        "output tokens/s",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        spreads = run.spreads()
        table.add_row(
            f"{run.rate:g}",
            *(str(run.count(end)) for end in ("ok", "refused", "failed")),
            "–" if run.attainment is None else f"{run.attainment:.1%}",
            _pair(spreads["ttft"]),
            _pair(spreads["tpot"]),
            f"{run.per_second(run.output_tokens):,.0f}",
        )
    return table


def _goodput_is_known(runs: Sequence[Run]) -> bool:
    """Several rates had targets."""
    return len(runs) > 1 and all(run.rate and run.targets for run in runs)


def _show_goodput(out: Console, runs: Sequence[Run]) -> None:
    tried = [run.rate or 0.0 for run in runs if not run.interrupted]
    for share in SHARES if tried else ():
        found = goodput(runs, share)
        said = f"less than {min(tried):g}"
        if found is not None:
            said = f"{found:g}"
            if found == max(tried):
                said += " or more"
        out.print(f"goodput at {share:.0%}: {said} requests/s, of the rates tried", markup=False)


def _pair(spread: Spread) -> str:
    return f"{_ms(spread.percentiles.p50)}/{_ms(spread.percentiles.p99)}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if math.isfinite(seconds) else "–"
