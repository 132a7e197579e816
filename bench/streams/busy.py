"""A system that is busy, not full: what it adds to a first token at a share of what it can take."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from bench.streams.clients import Client
from bench.streams.measure import Full, Probes, Row, added_ms
from bench.streams.open_loop import Requests
from bench.streams.processes import Process
from bench.streams.setting import Load

SHARE = 0.6
PROMPTS, OUTPUT_TOKENS = (1, 1), (12, 20)
WARM_UP_SECONDS, FULL_SECONDS, SETTLE_SECONDS, MOST_SECONDS = 3.0, 6.0, 2.0, 60.0
PROBES = 300
SEED = 7


async def measure_busy(
    system: str,
    load: Load,
    probes: Probes,
    loader: Client,
    process: Process,
    workers: Process,
) -> Row:
    """First the rate it serves with `load.streams` requests always under way, then first tokens are
    timed beside a Poisson process at SHARE of that rate. Clients as of `measure`."""
    await probes.warm_up()
    requests = Requests(loader, SEED, PROMPTS, OUTPUT_TOKENS)
    capacity = asyncio.create_task(requests.capacity(load.streams, FULL_SECONDS, WARM_UP_SECONDS))
    await asyncio.sleep(WARM_UP_SECONDS)
    meter = _Meter(process, workers)
    await asyncio.sleep(FULL_SECONDS)
    full_share, full_beside = meter.shares()
    rate = await capacity
    arriving = asyncio.create_task(requests.arrive(SHARE * rate, MOST_SECONDS))
    await asyncio.sleep(SETTLE_SECONDS)
    began, meter, before = time.perf_counter(), _Meter(process, workers), replace(requests.seen)
    added, router = await added_ms(probes, PROBES)
    share, beside = meter.shares()
    seconds, seen = time.perf_counter() - began, replace(requests.seen)
    if arriving.done():
        raise RuntimeError("first tokens took longer than the load lasted")
    arriving.cancel()
    await asyncio.wait({arriving})
    tokens = seen.tokens - before.tokens
    return Row(
        system,
        load.streams,
        tokens / max(1, seen.messages - before.messages),
        1e6 * share * seconds / max(1, tokens),
        tokens / seconds,
        added,
        "busy",
        share,
        0.0,
        requests.seen.wrong,
        router,
        Full(SHARE, rate, full_share, (full_beside, beside)),
    )


class _Meter:
    """Shares of both cores since it was made."""

    def __init__(self, process: Process, workers: Process) -> None:
        self._process, self._workers = process, workers
        self._began = time.perf_counter()
        self._cpu = self._read()

    def _read(self) -> tuple[float, float]:
        beside = self._workers.cpu_seconds() + time.process_time()
        return self._process.cpu_seconds(), beside

    def shares(self) -> tuple[float, float]:
        """The system's core; that of engines and clients, which run here."""
        seconds = time.perf_counter() - self._began
        system, beside = (now - then for now, then in zip(self._read(), self._cpu, strict=True))
        return system / seconds, beside / seconds
