"""`pdserve doctor`."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from cluster.cli.checks import all_checks
from cluster.cli.terminal import EXIT_FAILED, EXIT_OK, Terminal
from cluster.config import Config

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def run(terminal: Terminal, config: Config, as_json: bool) -> int:
    """Exits 1 if anything fails."""
    checks = all_checks(config)
    failed = any(check.verdict == "fail" for check in checks)
    if as_json:
        terminal.json({"ok": not failed, "checks": [asdict(check) for check in checks]})
        return EXIT_FAILED if failed else EXIT_OK
    table = Table.grid(padding=(0, 2))
    for check in checks:
        verdict = Text(check.verdict, style=_COLOURS[check.verdict])
        table.add_row(verdict, Text(check.name, no_wrap=True), Text(check.detail))
        if check.remedy:
            table.add_row("", "", Text(f"→ {check.remedy}", style="bold"))
    terminal.out.print(table)
    return EXIT_FAILED if failed else EXIT_OK
