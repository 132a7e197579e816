"""`pdserve status`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from cluster.cli.calls import STATUS_SECONDS, ClusterView
from cluster.cli.terminal import EXIT_FAILED, EXIT_OK, Terminal
from cluster.cli.timeline import spoken_bytes
from cluster.cli.top_looks import Look, Watcher

_COLOURS = {"ready": "green", "failed": "red"}


def run(terminal: Terminal, address: str, as_json: bool, token: str = "") -> int:
    """Exits 1 unless every worker is ready."""
    look = asyncio.run(_look(address, token))
    view = look.view
    if as_json:
        terminal.json(_values(look))
    else:
        _print(terminal, view, look.silent)
    good = view.workers and all(worker.state == "ready" for worker in view.workers)
    return EXIT_OK if good else EXIT_FAILED


async def _look(address: str, token: str) -> Look:
    async with Watcher(address, token, STATUS_SECONDS) as watcher:
        return await watcher.look()


def _values(look: Look) -> dict[str, Any]:
    """For `--json`."""
    routers = [
        {**asdict(router), "silent": look.silent.get(router.router_id, "")}
        for router in look.view.routers
    ]
    return {**asdict(look.view), "routers": routers}


def _print(terminal: Terminal, view: ClusterView, silent: Mapping[str, str]) -> None:
    """
    Args:
        silent: why a router did not say what it runs, by its id.
    """
    workers = Table(title=f"cluster {view.cluster}", title_justify="left", box=None)
    for column in ("worker", "role", "state", "running"):
        workers.add_column(column, no_wrap=True)
    for column in ("blocks", "pinned", "memory"):
        workers.add_column(column, justify="right", no_wrap=True)
    for worker in view.workers:
        colour = _COLOURS.get(worker.state, "yellow")
        workers.add_row(
            worker.worker_id,
            worker.role,
            f"[{colour}]{worker.state}[/]",
            str(worker.running_sequences),
            f"{worker.engine_blocks_used}/{worker.engine_blocks_total}",
            f"{worker.pinned_blocks} ({spoken_bytes(worker.pinned_bytes)})",
            spoken_bytes(worker.resident_bytes),
        )
    routers = Table(box=None)
    for column in ("router", "gRPC", "HTTP", "running"):
        routers.add_column(column, no_wrap=True)
    for router in view.routers:
        running = "–" if router.running_requests is None else str(router.running_requests)
        routers.add_row(router.router_id, router.grpc_address, router.http_address, running)
    terminal.out.print(workers)
    terminal.out.print(routers)
    for worker in view.workers:  # not in the table, which a narrow terminal would cut
        link = "" if worker.connected or worker.state != "ready" else "no stream from the router"
        if detail := worker.detail or link:
            terminal.out.print(
                f"{worker.worker_id} {worker.state}: {detail}", markup=False, highlight=False
            )
    for router_id, why in silent.items():
        terminal.out.print(f"{router_id} does not answer: {why}", markup=False, highlight=False)
    if not view.store_reachable:
        terminal.err.print("[yellow]the store does not answer: this is the router's last view[/]")
