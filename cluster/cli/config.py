"""`pdserve config`: check, show, diff, reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.terminal import EXIT_FAILED, EXIT_OK, Terminal

File = Annotated[
    Path | None,
    typer.Option("-f", "--file", help="The cluster's YAML. Unset: the shipped demo cluster."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def config_commands(terminal: Terminal) -> typer.Typer:
    """The commands. None of them prints a secret."""
    app = typer.Typer(no_args_is_help=True, help="Check, show or compare configurations.")

    @app.command()
    def check(file: File = None, as_json: Json = False) -> None:
        """Check a configuration without starting anything."""
        from cluster.config import Config

        config = Config.load(file)
        if as_json:
            terminal.json({"ok": True, "name": config.name})
        else:
            names = ", ".join(model.name for model in config.models)
            terminal.out.print(f"ok: cluster {config.name}, {names}", markup=False)

    @app.command()
    def show(file: File = None) -> None:
        """Print the whole configuration, defaults included, secrets masked."""
        from cluster.config import Config

        terminal.json(Config.load(file).model_dump(mode="json"))

    @app.command()
    def diff(
        file: File = None,
        against: Annotated[
            Path | None, typer.Option(help="Another file. Unset: the cluster that runs here.")
        ] = None,
        name: Annotated[str | None, typer.Option(help="Of the cluster, where several run.")] = None,
        as_json: Json = False,
    ) -> None:
        """Tell what a file changes, and whether `pdserve reload` would take it. Exits 1 if not."""
        from cluster.cli.reload import spoken
        from cluster.cli.rundir import RunDir, find
        from cluster.config import Config
        from cluster.config_changes import changes, flatten

        old = (
            flatten(Config.load(against))
            if against is not None
            else RunDir(find(name).name).read_config()
        )
        found = changes(old, flatten(Config.load(file)))
        if as_json:
            terminal.json(
                {
                    "changes": [
                        {"change": spoken(c), "live": c.live, "why_not": c.why_not} for c in found
                    ]
                }
            )
        else:
            for change in found:
                how = "live" if change.live else change.why_not
                terminal.out.print(f"{spoken(change)}  ({how})", markup=False)
            if not found:
                terminal.out.print("nothing differs", markup=False)
        raise typer.Exit(EXIT_OK if all(change.live for change in found) else EXIT_FAILED)

    @app.command()
    def reference() -> None:
        """Print the reference of every field, as in docs/configuration.md."""
        from cluster.config_reference import markdown

        print(markdown(), end="")

    return app
