"""An engine process: `python -m bench.gpu.child FD` serves one engine over the socket FD."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

from bench.gpu.engines import OurEngine, PlainEngine
from bench.gpu.wire import (
    AskHoldings,
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
    """Answers commands, each in a task of its own, until it is stopped or the session is gone."""

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
            if isinstance(command, Stop):
                return None
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
            case Stop():
                await self._engine.stop()
                return None

    async def _announce(self, number: int, first: asyncio.Event) -> None:
        await first.wait()
        await send(self._writer, Envelope(number, FirstToken()))


async def serve(sock: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 24)
    child = Child(writer)
    async with asyncio.TaskGroup() as group:
        while (envelope := await receive(reader)) is not None:
            task = group.create_task(child.answer(envelope))
            if isinstance(envelope.content, Stop):
                await task
                return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))
