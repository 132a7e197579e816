"""One measurement: streams held open, CPU time read around a window, probes in turns."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

from bench.streams.clients import Client, Seen
from bench.streams.processes import Process
from bench.streams.setting import LOAD, PROBE, Load

WINDOW_SECONDS = 6.0
OPEN_SECONDS = 90.0
PROBES = 60
PROBE_GAP_SECONDS = 0.02
PROBE_SECONDS = 20.0
"""Then there are no more, if each takes long."""


@dataclass(frozen=True)
class Full:
    """A system that had all it could take.

    Attributes:
        load: of it, that was offered when the rest of the row was measured.
        core_share: as Row's.
        beside: of the core of engines and clients, then, and at `load`.
    """

    load: float
    requests_per_s: float
    core_share: float
    beside: tuple[float, float]

    def text(self) -> str:
        return (
            f"at {100 * self.load:.0f} % of {self.requests_per_s:.0f} requests/s, which take "
            f"{100 * self.core_share:.0f} % of the core; beside "
            + ", ".join(f"{100 * share:.0f} %" for share in self.beside)
        )


@dataclass(frozen=True)
class Probes:
    """Ways to a first token.

    Attributes:
        through, past: the same kind of client, through the system and past it, where one engine
            serves the request whole.
        light, hops: light clients, through pdserve's router and straight to both of its workers;
            None: of another system.
    """

    through: Client
    past: Client
    light: Client | None = None
    hops: Client | None = None

    @property
    def ways(self) -> list[Client]:
        """Each before the one that it is compared with."""
        ways = (self.through, self.past, self.light, self.hops)
        return [way for way in ways if way is not None]

    async def warm_up(self) -> None:
        for way in 3 * self.ways:
            await _first(way)

    async def close(self) -> None:
        for way in self.ways:
            await way.close()


@dataclass(frozen=True)
class Row:
    """What is reported of a system under a load.

    Attributes:
        load: one of bench.router's.
        core_share: of a core, that the system took.
        kib_per_stream: of memory that the open streams take in the system.
        wrong: streams that lost or repeated a token.
        ttft_router_ms: over what the same two workers take without a router; empty if not measured.
        full: of a busy system: what it took and served when it had all it could take.
    """

    system: str
    streams: int
    tokens_per_message: float
    cpu_us_per_token: float
    tokens_per_s: float
    ttft_added_ms: dict[str, float]
    load: str
    core_share: float
    kib_per_stream: float
    wrong: int
    ttft_router_ms: dict[str, float]
    full: Full | None = None

    def values(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return (
            f"{self.system:14} {self.streams:5} streams "
            f"{self.load:9} "
            f"{self.tokens_per_message:5.1f} tok/msg {self.cpu_us_per_token:7.1f} us/tok "
            f"{self.tokens_per_s:8.0f} tok/s {100 * self.core_share:4.0f} % core, TTFT "
            f"+{_pair(self.ttft_added_ms)} ms, of the router {_pair(self.ttft_router_ms)}, "
            f"{self.kib_per_stream:.0f} KiB/stream, wrong {self.wrong}"
            + (f", {self.full.text()}" if self.full is not None else "")
        )


async def measure(
    system: str,
    load: Load,
    kind: str,
    probes: Probes,
    loader: Client,
    process: Process,
) -> Row:
    """Of streams that go on, which `loader` opens."""
    await probes.warm_up()
    before = process.resident_bytes()
    seen = Seen()
    streams = [asyncio.create_task(_keep(loader, load, seen)) for _ in range(load.streams)]
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            while seen.begun < 0.98 * load.streams:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)
        resident = process.resident_bytes() - before
        cpu, tokens, messages = process.cpu_seconds(), seen.tokens, seen.messages
        began = time.perf_counter()
        await asyncio.sleep(WINDOW_SECONDS)
        seconds = time.perf_counter() - began
        cpu = process.cpu_seconds() - cpu
        tokens, messages = seen.tokens - tokens, seen.messages - messages
        added, router = await added_ms(probes, PROBES)
    finally:
        for stream in streams:
            stream.cancel()
        results = await asyncio.gather(*streams, return_exceptions=True)
    failed = [r for r in results if isinstance(r, Exception)]
    if failed:
        raise failed[0]
    return Row(
        system,
        load.streams,
        tokens / max(1, messages),
        1e6 * cpu / max(1, tokens),
        tokens / seconds,
        added,
        kind,
        cpu / seconds,
        resident / 1024 / load.streams,
        seen.wrong,
        router,
    )


async def _keep(client: Client, load: Load, seen: Seen) -> None:
    """One stream after the other."""
    lasts = max(30.0, load.streams / 25)  # longer than it takes to open all of them
    tokens = max(8, min(3900, round(lasts / load.gap_seconds * load.tokens_per_output)))
    while True:
        await client.run(LOAD, tokens, seen)


async def added_ms(probes: Probes, most: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds through the system minus milliseconds past it, at the same moments; and the same
    over both workers without a router."""
    ways = probes.ways
    took: list[list[float]] = [[] for _ in ways]
    until = time.perf_counter() + PROBE_SECONDS
    while len(took[-1]) < most and time.perf_counter() < until:
        for way, seconds in zip(ways, took, strict=True):
            seconds.append(await _first(way))
        await asyncio.sleep(PROBE_GAP_SECONDS)
    added = [_difference(a, b) for a, b in zip(took[::2], took[1::2], strict=True)]
    return added[0], added[1] if len(added) > 1 else {}


async def _first(client: Client) -> float:
    return (await client.run(PROBE, 2, Seen())).first


def _difference(through: list[float], around: list[float]) -> dict[str, float]:
    """Of quantiles, in milliseconds."""
    through, around, count = sorted(through), sorted(around), len(through)
    at = {"p50": count // 2, "p99": max(0, count * 99 // 100 - 1)}
    return {name: round(1e3 * (through[i] - around[i]), 2) for name, i in at.items()}


def _pair(of: dict[str, float]) -> str:
    return f"{of['p50']:.1f}/{of['p99']:.1f}" if of else "-"
