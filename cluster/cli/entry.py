"""The console script. Nothing is imported before a Ctrl-C would end it quietly."""

import os
import signal
import sys

EXIT_INTERRUPTED = 130


def main() -> None:
    """Imports the commands, and runs the one that was asked for."""
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from cluster.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    sys.exit(main())
