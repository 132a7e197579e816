"""`pdserve reload`: another command's file, taken over by `pdserve up`.

The two meet in the runtime directory, which is its owner's alone: one file asks, one answers.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.cli.launch import Cluster
from cluster.cli.rundir import MAILBOXES, RunDir, find, write_private
from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.config import Config
from cluster.config_changes import Change, changes, flatten
from cluster.errors import ConfigError, PdserveError, Unavailable

REPLY_SECONDS = 30.0
REQUEST, REPLY = MAILBOXES


class Reloads:
    """`pdserve up`'s side.

    Args:
        load: reads a configuration as `up` did, with its command line's overrides.
    """

    def __init__(
        self, cluster: Cluster, rundir: RunDir, load: Callable[[Path | None], Config]
    ) -> None:
        self._cluster = cluster
        self._rundir = rundir
        self._load = load

    async def answer(self) -> None:
        """Carries out what was asked for since the last call, if anything was."""
        path = self._rundir.path / REQUEST
        try:
            asked = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        path.unlink(missing_ok=True)
        error, changed = "", []
        try:
            changed = await self._apply(Path(asked["file"]) if asked["file"] else None)
        except PdserveError as failure:
            error = str(failure)
        except Exception as failure:  # whatever is wrong with the file, the cluster serves on
            error = f"not reloaded: {type(failure).__name__}: {failure}"
        reply = {"id": asked["id"], "error": error, "changed": changed}
        with suppress(Unavailable):  # a full disk; who asked will say that there was no answer
            write_private(self._rundir.path / REPLY, json.dumps(reply))

    async def _apply(self, file: Path | None) -> list[str]:
        config = self._load(file)
        found = changes(self._rundir.read_config(), flatten(config))
        if refused := [change for change in found if not change.live]:
            lines = "".join(f"\n  {change.path}: {change.why_not}" for change in refused)
            raise ConfigError(f"not reloaded, nothing was changed:{lines}")
        complaints: list[str] = []
        if found or config.tenants or config.operator.given:  # their files may say something new
            complaints = await self._cluster.reload(config)
        return [*map(spoken, found), *(f"not taken over: {each}" for each in complaints)]


def reload(terminal: Terminal, name: str | None, file: Path | None) -> int:
    """Asks the running cluster to take `file` over, and tells what came of it.

    Raises:
        ConfigError: it was refused, and nothing was changed.
        Unavailable: no cluster runs here, or it does not answer.
    """
    rundir = RunDir(find(name).name)
    mark = secrets.token_hex(8)
    asked = {"id": mark, "file": str(file.resolve()) if file else ""}
    write_private(rundir.path / REQUEST, json.dumps(asked))
    deadline = time.monotonic() + REPLY_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            reply = json.loads((rundir.path / REPLY).read_text())
            if reply["id"] == mark:
                return _tell(terminal, reply["error"], reply["changed"])
        time.sleep(0.1)
    raise Unavailable(
        f"`pdserve up` did not answer within {REPLY_SECONDS:g} s: is it still starting, or "
        f"{rundir.path} full?"
    )


def spoken(change: Change) -> str:
    """One line; of a secret only that it has changed."""
    if str(change.old).startswith("secret ") or str(change.new).startswith("secret "):
        return f"{change.path}: changed"
    return f"{change.path}: {change.old} → {change.new}"


def _tell(terminal: Terminal, error: str, changed: list[str]) -> int:
    if error:
        raise ConfigError(error)
    for line in changed:
        terminal.out.print(line, markup=False)
    terminal.out.print("reloaded" if changed else "nothing has changed", markup=False)
    return EXIT_OK
