"""`pdserve up` and `pdserve down`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.cli.checks import before_start
from cluster.cli.launch import Cluster
from cluster.cli.progress import Progress
from cluster.cli.reload import Reloads
from cluster.cli.rundir import RunDir, find, wait_gone
from cluster.cli.supervise import supervise
from cluster.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Terminal
from cluster.config import Config
from cluster.control.orphans import reap_adopted
from cluster.errors import EngineFailed, Unavailable

WATCH_SECONDS = 1.0


def up(terminal: Terminal, file: Path | None, load: Callable[[Path | None], Config]) -> None:
    """Serves until interrupted; does not return.

    Args:
        load: reads a configuration, with the command line's overrides.
    """
    config = load(file)
    rundir = RunDir(config.name)

    async def work() -> int:
        rundir.acquire()
        before_start(config)
        terminal.keep_for_ourselves(rundir.logs / "cli.log")
        return await _serve(terminal, config, rundir, load)

    supervise(terminal, work)


async def _serve(
    terminal: Terminal, config: Config, rundir: RunDir, load: Callable[[Path | None], Config]
) -> int:
    code, error = EXIT_INTERRUPTED, None
    with Progress(terminal.err) as progress:
        cluster = Cluster(config, rundir, progress)
        try:
            status = await cluster.start()
            router = next(slot for slot in status.slots if slot.kind == "router")
            scheme = "http" if config.router.tls is None else "https"
            urls = f"gRPC  {router.grpc_address}\nHTTP  {scheme}://{router.http_address}"
            terminal.out.print(urls, markup=False)
            if router.operator_address != router.grpc_address:
                terminal.out.print(f"Operator  {router.operator_address}")
            terminal.out.print('try   pdserve generate "…"      stop with Ctrl-C', markup=False)
            code = EXIT_OK
            await _watch(cluster, Reloads(cluster, rundir, load))
        except asyncio.CancelledError:
            pass  # a way to end: 0 once it served
        except Exception as failure:
            error, code = failure, EXIT_FAILED
        drain = cluster.config.lifecycle.drain_timeout_seconds if code == EXIT_OK else 0.0
        left = await cluster.stop(drain)
    if error is not None:
        terminal.fail(error)
    if left and code == EXIT_OK:
        terminal.err.print(f"had to kill: {', '.join(left)}", markup=False)
    return code


async def _watch(cluster: Cluster, reloads: Reloads) -> None:
    """Shows what dies and comes back and takes new configurations over, until cancelled."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        await reloads.answer()
        reap_adopted()
        with suppress(Unavailable):
            status = await cluster.status()
            if status.failed and all(slot.state == "failed" for slot in status.slots):
                raise EngineFailed("every worker and router has failed: see the logs")


def down(terminal: Terminal, name: str | None, timeout: float) -> int:
    """Ends the running cluster and waits until it is gone."""
    state = find(name)
    process = state.process()
    with Progress(terminal.err) as progress:
        progress.show(state.name, "stopping", f"pid {state.pid}")
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        if not wait_gone(state, timeout):
            progress.show(state.name, "failed", f"still there after {timeout:g} s")
            raise Unavailable(
                f"the cluster still drains (pid {state.pid}): call `pdserve down` again to force it"
            )
        progress.show(state.name, "gone")
    return EXIT_OK
