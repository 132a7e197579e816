"""Live progress: a line per part with its elapsed seconds; plain lines without a terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_MARKS = {"ready": "[green]●[/]", "failed": "[red]✗[/]", "gone": "[dim]○[/]"}


@dataclass
class _Part:
    started: float
    state: str
    detail: str
    ended: float | None = None


class Progress:
    """A context manager; `show` may be called as often as one likes."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._parts: dict[str, _Part] = {}
        self._spinner = Spinner("dots")
        live = console.is_terminal and not quiet
        self._live = (
            Live(
                console=console,
                get_renderable=self._table,
                redirect_stdout=False,
                redirect_stderr=False,
                refresh_per_second=8,
            )
            if live
            else None
        )

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, part: str, state: str, detail: str = "") -> None:
        """`part` is now `state`: ready, failed and gone are final until the next change."""
        now = time.monotonic()
        known = self._parts.get(part)
        if known is not None and (known.state, known.detail) == (state, detail):
            return
        final = state in _MARKS
        started = now if known is None or known.ended is not None else known.started
        self._parts[part] = _Part(started, state, detail, now if final else None)
        if self._live is None and not self._quiet:
            seconds = f"{now - started:6.1f} s"
            self._console.print(f"{seconds}  {part}: {state} {detail}".rstrip(), markup=False)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for name, part in self._parts.items():
            mark = Text.from_markup(_MARKS[part.state]) if part.state in _MARKS else self._spinner
            seconds = (part.ended or time.monotonic()) - part.started
            table.add_row(
                mark,
                Text(name),
                Text(f"{seconds:5.1f} s", style="dim"),
                Text(part.state),
                Text(part.detail, style="dim", overflow="ellipsis", no_wrap=True),
            )
        return table
