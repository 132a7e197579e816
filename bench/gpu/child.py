"""An engine process: `python -m bench.gpu.child FD` serves one engine over the socket FD."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

from bench.gpu.engines import OurEngine, PlainEngine
from bench.gpu.wire import (
    AskHoldings,
    AskSums,
    Command,
    Envelope,
    Failed,
    FirstToken,
    Generate,
    Start,
    Stop,
    receive,
    send,
)

log = logging.getLogger(__name__)


class Child:
    """Answers commands about its engine."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._engine: OurEngine | PlainEngine | None = None

    async def answer(self, envelope: Envelope) -> None:
        number, command = envelope.number, envelope.content
        try:
            content = await self._obey(number, command)
        except Exception as error:
            log.exception("%s failed", type(command).__name__)
            content = Failed(f"{type(error).__name__}: {error}")
        await send(self._writer, Envelope(number, content))

    async def _obey(self, number: int, command: Command) -> object:
        if isinstance(command, Start):
            make = OurEngine if command.spec.kind == "pdserve" else PlainEngine
            engine: OurEngine | PlainEngine = await asyncio.to_thread(make, command.spec)
            self._engine = engine
            return await engine.start()
        if self._engine is None:
            raise ValueError("the engine has not been started")
        match command:
            case Generate():
                first = asyncio.Event()
                if command.announce:
                    async with asyncio.TaskGroup() as group:
                        running = group.create_task(self._engine.generate(command, first))
                        group.create_task(self._announce(number, first))
                    return running.result()
                return await self._engine.generate(command, first)
            case AskHoldings():
                return await self._engine.holdings()
            case AskSums():
                return await self._engine.sums(command.handoff_id)
            case Stop():
                raise ValueError("a stop is the last command")

    async def stop(self) -> None:
        if self._engine is not None:
            await self._engine.stop()

    async def _announce(self, number: int, first: asyncio.Event) -> None:
        await first.wait()
        await send(self._writer, Envelope(number, FirstToken()))


async def serve(sock: socket.socket) -> None:
    """Obeys, each command in a task of its own, until it is told to stop or the session is gone.

    The engine is ended either way.
    """
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 24)
    child = Child(writer)
    tasks: set[asyncio.Task[None]] = set()
    while (envelope := await receive(reader)) is not None:
        if isinstance(envelope.content, Stop):
            break
        tasks.add(task := asyncio.create_task(child.answer(envelope)))
        task.add_done_callback(tasks.discard)
    for task in tuple(tasks):
        task.cancel()
    await child.stop()
    if envelope is not None:
        await send(writer, Envelope(envelope.number))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))
