"""Where a life's output goes, its last lines, and what they say of its end."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

TAIL_LINES = 8
_TAIL_BYTES = 65_536
_ERROR = re.compile(r"\b\w*(?:Error|Exception): .+")
_FOLLOWS = re.compile("WorkerProc initialization failed|Engine core initialization failed")
"""What vLLM says where a process of its own has died, which logged why."""


def redirect_output(path: Path) -> int:
    """Sends this process's stdout and stderr, and its future children's, to `path`; how many bytes
    of former lives it has."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    former = os.fstat(log).st_size
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    return former


def tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log that say something; none if it cannot be read."""
    return _last(log)[-lines:]


def with_cause(reason: str, log: Path, former: int) -> str:
    """`reason`; where vLLM only points to its log there, what the log says instead, behind its
    first `former` bytes."""
    pointer = _FOLLOWS.search(reason)
    if pointer is None:
        return reason
    for line in reversed(_last(log, former)):
        if (error := _ERROR.search(line)) and not _FOLLOWS.search(line):
            return reason[: pointer.start()] + error[0]
    return reason


def _last(log: Path, former: int = 0) -> list[str]:
    with suppress(OSError), log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(former, file.tell() - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()]
    return []
