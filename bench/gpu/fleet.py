"""The session's engine processes: started at once, asked with deadlines, ended without remains."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.gpu.wire import (
    AskHoldings,
    AskSums,
    Command,
    EngineSpec,
    Envelope,
    Failed,
    FirstToken,
    Generate,
    Generated,
    Start,
    Stop,
    Sums,
    receive,
    send,
)
from cluster.engine.protocol import EngineInfo, Holdings

ASK_SECONDS = 120.0
"""The first logprobs of an engine wait for a kernel to be compiled."""
STOP_SECONDS = 15.0
END_SECONDS = 5.0


class EngineGone(RuntimeError):
    """An engine process failed or ended; the message says what is known."""


class Engine:
    """One engine process. Made by `Fleet.start`."""

    def __init__(
        self,
        spec: EngineSpec,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self._process = process
        self._writer = writer
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._begun: dict[int, asyncio.Event] = {}
        self._reading = asyncio.create_task(self._read(reader))
        self._watching = asyncio.create_task(self._watch())

    async def generate(
        self, asked: Generate, begun: asyncio.Event | None = None, timeout: float = ASK_SECONDS
    ) -> Generated:
        """Raises EngineGone, TimeoutError. `begun` is set at the first token."""
        answer = await self._ask(asked, timeout, begun)
        assert isinstance(answer, Generated)
        return answer

    async def holdings(self) -> Holdings:
        answer = await self._ask(AskHoldings(), ASK_SECONDS)
        assert isinstance(answer, Holdings)
        return answer

    async def sums(self, handoff_id: str) -> Sums:
        answer: Sums = await self._ask(AskSums(handoff_id), ASK_SECONDS)
        return answer

    async def start(self, timeout: float) -> None:
        self.info = await self._ask(Start(self.spec), timeout)

    async def stop(self) -> None:
        """Ends the engine, if need be by force, and every process it started."""
        with contextlib.suppress(EngineGone, TimeoutError):
            await self._ask(Stop(), STOP_SECONDS)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._writer.close()
        await self._watching

    async def _ask(
        self, command: Command, timeout: float, begun: asyncio.Event | None = None
    ) -> Any:
        if self._watching.done():
            raise EngineGone(f"{self.spec.name} has ended; see its log")
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        if begun is not None:
            self._begun[number] = begun
        try:
            async with asyncio.timeout(timeout):
                await send(self._writer, Envelope(number, command))
                content = await answer
        except TimeoutError as error:
            asked = type(command).__name__
            raise TimeoutError(
                f"{self.spec.name}: no answer to {asked} in {timeout:.0f} s"
            ) from error
        except ConnectionError as error:
            raise EngineGone(f"{self.spec.name} has ended; see its log") from error
        finally:
            self._asked.pop(number, None)
            self._begun.pop(number, None)
        if isinstance(content, Failed):
            raise EngineGone(f"{self.spec.name}: {content.error}")
        return content

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (envelope := await receive(reader)) is not None:
            if isinstance(envelope.content, FirstToken):
                if begun := self._begun.get(envelope.number):
                    begun.set()
            elif (answer := self._asked.get(envelope.number)) and not answer.done():
                answer.set_result(envelope.content)

    async def _watch(self) -> None:
        """Fails what is asked when the process ends; its children may still hold the socket."""
        await self._process.wait()
        self._reading.cancel()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(EngineGone(f"{self.spec.name} has ended; see its log"))


class Fleet:
    """Starts engines.

    Args:
        logs, caches: folders for each engine's log and for what it compiles.
    """

    def __init__(self, logs: Path, caches: Path) -> None:
        self._logs = logs
        self._caches = caches

    @asynccontextmanager
    async def start(
        self, specs: Sequence[EngineSpec], timeout: float
    ) -> AsyncIterator[tuple[dict[str, Engine], dict[str, str]]]:
        """Engines that came up, by name, and why the others did not. All are ended afterwards."""
        engines = {spec.name: await self._spawn(spec) for spec in specs}
        try:
            started = await asyncio.gather(
                *(engine.start(timeout) for engine in engines.values()), return_exceptions=True
            )
            why = {
                name: str(error) or type(error).__name__
                for name, error in zip(engines, started, strict=True)
                if isinstance(error, BaseException)
            }
            yield {name: engine for name, engine in engines.items() if name not in why}, why
        finally:
            await asyncio.gather(*(engine.stop() for engine in engines.values()))

    async def _spawn(self, spec: EngineSpec) -> Engine:
        ours, theirs = socket.socketpair()
        with theirs, (self._logs / f"{spec.name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "bench.gpu.child",
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=environment(spec, self._caches / spec.name, dict(os.environ)),
                start_new_session=True,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 24)
        return Engine(spec, process, reader, writer)


def environment(spec: EngineSpec, caches: Path, base: dict[str, str]) -> dict[str, str]:
    """Of an engine process; compile caches of its own, so that engines may start at once."""
    chosen = surroundings(spec.gpus, caches)
    if not spec.gpus:
        chosen |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(spec.threads)}
    if spec.port:
        chosen["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(spec.port)
    return base | chosen


def surroundings(cards: tuple[int, ...], caches: Path) -> dict[str, str]:
    """What any process with an engine in it is told."""
    chosen = {
        "HF_HUB_OFFLINE": "1",
        "NCCL_NVLS_ENABLE": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # of every engine, and all start at once
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    if cards:
        chosen["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, cards))
    return chosen
