"""`pdserve top`: the cluster live, until q or Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Group
from rich.live import Live
from rich.text import Text

from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.cli.top_looks import Watcher
from cluster.cli.top_tables import tables
from cluster.cli.top_view import Frame, frame
from cluster.errors import DeadlineExceeded, Unavailable

FIRST_SECONDS = 1.0
"""At most, between the two looks that the first rates are of."""


class Screen(Protocol):
    """Where refreshes go."""

    def show(self, now: Frame) -> None: ...
    def lost(self, error: str, seconds: float) -> None:
        """No router has answered for so long."""
        ...


def run(
    terminal: Terminal, address: str, token: str, interval: float, once: bool, as_json: bool
) -> int:
    """Shows it every `interval` seconds; without a terminal as plain tables, one after another."""
    live = not (once or as_json) and terminal.out.is_terminal and not terminal.out.is_dumb_terminal
    try:
        if live:
            with LiveScreen(terminal) as screen, key("q") as pressed:
                asyncio.run(_watch(address, token, interval, once, screen, pressed))
        else:
            plain: Screen = JsonScreen(terminal) if as_json else PlainScreen(terminal)
            asyncio.run(_watch(address, token, interval, once, plain, Key()))
    except KeyboardInterrupt:
        pass  # It is how one ends it.
    return EXIT_OK


class Key:
    """A key, pressed or not."""

    def __init__(self, fd: int | None = None, wanted: str = "") -> None:
        self._fd = fd
        self._wanted = wanted

    async def pressed(self, seconds: float) -> bool:
        """Waits so long for it."""
        if self._fd is None:
            await asyncio.sleep(seconds)
            return False
        loop, hit = asyncio.get_running_loop(), asyncio.Event()

        def read(fd: int) -> None:
            typed = os.read(fd, 64)
            if not typed:
                loop.remove_reader(fd)  # The terminal is gone.
            if not typed or self._wanted.encode() in typed.lower():
                hit.set()

        loop.add_reader(self._fd, read, self._fd)
        try:
            async with asyncio.timeout(seconds):
                await hit.wait()
            return True
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._fd)


@contextmanager
def key(wanted: str) -> Iterator[Key]:
    """Keys are read as they are pressed, and not shown, as long as this lasts."""
    if not sys.stdin.isatty():
        yield Key()
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield Key(fd, wanted)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


async def _watch(
    address: str, token: str, interval: float, once: bool, screen: Screen, end: Key
) -> None:
    async with Watcher(address, token) as watcher:
        before = await watcher.look()
        if await end.pressed(min(interval, FIRST_SECONDS)):
            return
        while True:
            try:
                now = await watcher.look()
            except (Unavailable, DeadlineExceeded) as error:
                if once:
                    raise
                screen.lost(error.message, time.monotonic() - before.at)  # They may come back.
            else:
                screen.show(frame(before, now))
                before = now
            if once or await end.pressed(interval):
                return


class LiveScreen:
    """The whole terminal, redrawn."""

    def __init__(self, terminal: Terminal) -> None:
        self._console = terminal.out
        self._live = Live(
            Text("…"),
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._last = Group()

    def __enter__(self) -> LiveScreen:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, now: Frame) -> None:
        self._last = tables(now, self._console.width)
        self._live.update(Group(self._last, Text("\nq quits", style="dim")), refresh=True)

    def lost(self, error: str, seconds: float) -> None:
        note = Text(f"{seconds:.0f} s old: {error}\n", style="bold red")
        self._live.update(Group(note, self._last), refresh=True)


class PlainScreen:
    """Tables one after another; in a pipe or a file no column is cut."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._out = terminal.for_tables

    def show(self, now: Frame) -> None:
        self._out.print(tables(now, self._out.width))
        self._out.print()

    def lost(self, error: str, seconds: float) -> None:
        self._terminal.err.print(f"nothing new for {seconds:.0f} s: {error}", markup=False)


class JsonScreen:
    """A line of JSON for each refresh."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def show(self, now: Frame) -> None:
        self._terminal.out.print(json.dumps(now.values()), markup=False)

    def lost(self, error: str, seconds: float) -> None:
        said = {"at_seconds": time.time(), "error": error, "age_seconds": seconds}
        self._terminal.out.print(json.dumps(said), markup=False)
