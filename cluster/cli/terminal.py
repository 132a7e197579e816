"""What the user sees: two consoles, one way to fail, and silence from everyone else."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.errors import PdserveError

DEBUG = os.environ.get("PDSERVE_DEBUG") == "1"

PIPE_COLUMNS = 200

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


class Terminal:
    """The consoles of a command: results on `out`, progress and errors on `err`. They print no
    emoji: rich sees one in an address such as `10:100:1`."""

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True, emoji=False)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def keep_for_ourselves(self, log: Path) -> None:
        """Sends this process's file descriptors 1 and 2 to `log`; only the consoles still reach the
        user. Ray, gRPC and their C++ parts write there what nobody asked for."""
        out = os.fdopen(os.dup(1), "w", buffering=1)
        err = os.fdopen(os.dup(2), "w", buffering=1)
        self.out = Console(file=out, highlight=False, soft_wrap=True, emoji=False)
        self.err = Console(file=err, highlight=False, soft_wrap=True, emoji=False)
        sys.stdout.flush()
        sys.stderr.flush()
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)

    @property
    def for_tables(self) -> Console:
        """As `out`; in a pipe or a file it has room for every column."""
        if self.out.is_terminal:
            return self.out
        return Console(
            file=self.out.file,
            width=PIPE_COLUMNS,
            highlight=False,
            soft_wrap=True,
            emoji=False,
        )

    def json(self, value: Any) -> None:
        """One JSON document on stdout."""
        self.out.print(json.dumps(value, indent=2), markup=False, highlight=False)

    def fail(self, error: BaseException) -> int:
        """Says what went wrong; returns the exit code."""
        if DEBUG:
            self.err.print("".join(traceback.format_exception(error)), markup=False)
        if isinstance(error, PdserveError):
            message = str(error)
        else:
            message = f"{type(error).__name__}: {error} (PDSERVE_DEBUG=1 shows where)"
        self.err.print("[bold red]error:[/]", end=" ")
        self.err.print(message, markup=False)
        return EXIT_FAILED


def flush(terminal: Terminal) -> None:
    """Before `os._exit`."""
    terminal.out.file.flush()
    terminal.err.file.flush()
