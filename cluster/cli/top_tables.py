"""A refresh of `pdserve top` as tables. Of the `run` sequences, those that `wait` have no token."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cluster.cli.calls import Quantiles
from cluster.cli.timeline import bar, spoken_bytes
from cluster.cli.top_view import Frame, Pool, Rates, Router, Worker

BAR_COLUMNS = 10
WIDE_COLUMNS = 112
COLOURS = {"ready": "green", "failed": "red"}
_FULL = ((0.95, "red"), (0.8, "yellow"), (0.0, "green"))
_NONE = "–"


def tables(frame: Frame, columns: int) -> Group:
    """All of it: the cluster in three lines, its pools, workers and routers, and what is wrong.

    Args:
        columns: that the terminal has; in few, bars, memory and addresses are left out.
    """
    wide = columns >= WIDE_COLUMNS
    parts: list[RenderableType] = [
        Text.from_markup(_head(frame)),
        Text(_totals(frame)),
        Text(_attained(frame)),
        Text(),
        _pools(frame.pools, wide),
        Text(),
        _workers(frame.workers, wide),
        Text(),
        _routers(frame.routers, wide),
    ]
    parts += [Text(line, style="yellow") for line in _notes(frame)]
    return Group(*parts)


def _head(frame: Frame) -> str:
    at = datetime.fromtimestamp(frame.wall).strftime("%H:%M:%S")
    ready = sum(worker.view.state == "ready" for worker in frame.workers)
    return (
        f"[bold]cluster {escape(frame.cluster)}[/]  {at}  {ready} of {len(frame.workers)} workers "
        f"ready, {_count(len(frame.routers), 'router')}"
    )


def _totals(frame: Frame) -> str:
    return (
        f"{_count(frame.running_requests, 'request')}, {frame.queued_requests} of them queued; "
        f"tokens/s: prompt {_rate(frame.rates.prompt)}, output {_rate(frame.rates.output)}"
    )


def _attained(frame: Frame) -> str:
    if frame.attainment is None:
        return "no request ended within the last minute"
    return f"{frame.attainment:.1%} of the last minute's {frame.requests} within their targets"


def _table(left: tuple[str, ...], right: tuple[str, ...], wide: bool) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="bold"
    )
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _numbers(wide: bool) -> tuple[str, ...]:
    kv = ("KV", "") if wide else ("KV",)
    return ("run", "wait", *kv, "pinned", "prompt/s", "output/s")


def _pools(pools: tuple[Pool, ...], wide: bool) -> Table:
    table = _table(("pool", "role", "ready"), _numbers(wide), wide)
    for pool in pools:
        table.add_row(
            escape(pool.model),
            pool.role,
            f"{pool.ready}/{pool.workers}",
            str(pool.running),
            str(pool.waiting),
            *_kv(pool.kv_share, wide),
            spoken_bytes(pool.pinned_bytes),
            *_spoken(pool.rates),
        )
    return table


def _workers(workers: tuple[Worker, ...], wide: bool) -> Table:
    columns = (*_numbers(wide), *(("memory",) if wide else ()))
    table = _table(("worker", "role", "state"), columns, wide)
    for worker in workers:
        view = worker.view
        state = "ejected" if view.ejected else view.state
        if view.state == "ready" and not view.connected:
            state = "no stream"
        colour = COLOURS.get(state, "yellow")
        numbers = (
            (
                str(view.running_sequences),
                str(view.waiting_sequences),
                *_kv(worker.kv_share, wide),
                spoken_bytes(view.pinned_bytes),
                *_spoken(worker.rates),
                spoken_bytes(view.resident_bytes),
            )[: len(columns)]
            if view.connected
            else (_NONE,) * len(columns)
        )
        table.add_row(escape(view.worker_id), view.role, f"[{colour}]{state}[/]", *numbers)
    return table


def _routers(routers: tuple[Router, ...], wide: bool) -> Table:
    columns = ("requests", "queued", "TTFT ms p50/90/99", "TPOT ms", "attained", "missed")
    table = _table(("router", "gRPC") if wide else ("router",), columns, wide)
    for router in routers:
        view, lately = router.view, router.view.lately
        cells: tuple[str, ...] = (_NONE,) * len(columns)
        if not router.silent:
            running = view.running_requests
            cells = (_NONE if running is None else str(running), str(router.queued))
            if lately is None or not lately.requests:
                cells += (_NONE,) * 4
            else:
                cells += (
                    _quantiles(lately.ttft_seconds, 0),
                    _quantiles(lately.tpot_seconds, 1),
                    f"{lately.attained / lately.requests:.1%}",
                    ", ".join(f"{n} {why}" for why, n in sorted(lately.missed.items())) or "none",
                )
        address = (view.grpc_address,) if wide else ()
        table.add_row(escape(view.router_id), *address, *cells)
    return table


def _notes(frame: Frame) -> Iterator[str]:
    """What does not fit into a table."""
    for worker in frame.workers:
        if worker.view.detail:
            yield f"{worker.view.worker_id} {worker.view.state}: {worker.view.detail}"
    for router in frame.routers:
        if router.silent:
            yield f"{router.view.router_id} does not answer: {router.silent}"
    if not frame.store_reachable:
        yield "the store does not answer: this is the router's last view"


def _kv(share: float, wide: bool) -> tuple[str, ...]:
    """The share, behind a bar as wide whatever it is."""
    colour = next(colour for least, colour in _FULL if share >= least)
    if not wide:
        return (f"[{colour}]{share:.0%}[/]",)
    drawn = bar(share, BAR_COLUMNS)
    return f"[{colour}]{drawn}[/][dim]{'·' * (BAR_COLUMNS - len(drawn))}[/]", f"{share:.0%}"


def _quantiles(of: Quantiles | None, digits: int) -> str:
    if of is None:
        return _NONE
    return "/".join(f"{seconds * 1e3:.{digits}f}" for seconds in (of.p50, of.p90, of.p99))


def _spoken(rates: Rates) -> tuple[str, str]:
    return _rate(rates.prompt), _rate(rates.output)


def _rate(rate: float | None) -> str:
    """In six characters at most, up to a thousand million."""
    if rate is None:
        return _NONE
    for unit in ("", "k"):
        if rate < 99_999.5:
            return f"{rate:,.0f}{unit}"
        rate /= 1000
    return f"{rate:,.0f}M"


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"
