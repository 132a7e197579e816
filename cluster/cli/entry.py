"""The console script. Before anything else is imported, a Ctrl-C ends it quietly."""

import os
import signal
from typing import NoReturn

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """Imports the commands, and runs the one that was asked for."""
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from cluster.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()
