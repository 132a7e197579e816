"""The arguments of `pdserve batch`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.terminal import Terminal

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str | None, typer.Option(help="Of the cluster, where several run.")]
Address = Annotated[
    str | None,
    typer.Option(help="host:port of a router's gRPC. Unset: the cluster that runs here."),
]
BatchId = Annotated[str, typer.Argument(help="As `submit` printed it.")]


def batch_app(terminal: Terminal, where: Callable[[str | None, str | None], str]) -> typer.Typer:
    """The commands. The token is that of PDSERVE_TOKEN.

    Args:
        where: the address of a router, from --address and --name.
    """
    app = typer.Typer(no_args_is_help=True, help="Jobs of many requests that may wait.")

    @app.command()
    def submit(
        file: Annotated[Path, typer.Argument(help="JSON lines, in OpenAI's batch format.")],
        endpoint: Annotated[str, typer.Option(help="Of all its lines.")] = "/v1/chat/completions",
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """Hand a job in."""
        from cluster.cli import batch as command

        raise typer.Exit(command.submit(terminal, where(address, name), file, endpoint, as_json))

    @app.command()
    def get(
        batch_id: BatchId, name: Name = None, address: Address = None, as_json: Json = False
    ) -> None:
        """Show a job: its state, and how many lines have a result."""
        from cluster.cli import batch as command

        raise typer.Exit(command.get(terminal, where(address, name), batch_id, as_json))

    @app.command("list")
    def list_jobs(
        limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
        name: Name = None,
        address: Address = None,
        as_json: Json = False,
    ) -> None:
        """List jobs, newest first."""
        from cluster.cli import batch as command

        raise typer.Exit(command.jobs(terminal, where(address, name), limit, as_json))

    @app.command()
    def cancel(
        batch_id: BatchId, name: Name = None, address: Address = None, as_json: Json = False
    ) -> None:
        """Cancel a job; results that are there stay."""
        from cluster.cli import batch as command

        raise typer.Exit(command.cancel(terminal, where(address, name), batch_id, as_json))

    @app.command()
    def results(
        batch_id: BatchId,
        wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has ended.")] = True,
        name: Name = None,
        address: Address = None,
    ) -> None:
        """Print results as JSON lines; exits 1 if a line failed."""
        from cluster.cli import batch as command

        raise typer.Exit(command.results(terminal, where(address, name), batch_id, wait))

    return app
