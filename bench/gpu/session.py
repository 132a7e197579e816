"""A session: wave after wave of engines, section after section, whatever of it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.gpu.agents import agent_sends
from bench.gpu.bars import GRPC, NCCL, NIXL, ONE, PREFILL, PREFILL_ALONE
from bench.gpu.exactness import exactness, ledgers
from bench.gpu.fleet import Engine, Fleet
from bench.gpu.latencies import latencies, unhidden
from bench.gpu.plan import Group, Setting, groups, waves
from bench.gpu.raw import raw_sends
from bench.gpu.results import MIB, AgentSend, Latency, Missing, RawSend, Results
from bench.gpu.steps import steps
from bench.gpu.systems import NixlSplit, Split, System, Whole

SECTIONS = ("raw", "agents", "latency", "unhidden", "steps", "exact")
SECTION_SECONDS = {
    "raw": 100,
    "agents": 60,
    "latency": 240,
    "unhidden": 90,
    "steps": 120,
    "exact": 150,
}


@dataclass(frozen=True)
class Load:
    """What is asked of the engines; lengths in tokens.

    Attributes:
        output: tokens per request of the latency section.
        batch_tokens: decoded per sequence of the full batch.
        span_seconds: of a quiet or a receiving part of a round.
    """

    prompts: tuple[int, ...]
    runs: int
    output: int
    exact_prompts: tuple[int, ...]
    batch: int
    batch_context: int
    batch_tokens: int
    inbound: int
    rounds: int
    span_seconds: float
    vocab: int
    kv_bytes_per_token: int


class Session:
    """Measures into `results` and calls `save` after each section.

    Args:
        only: of SECTIONS.
        logs, caches: folders for the engines' logs and for what they compile.
        ends: CLOCK_MONOTONIC seconds after which nothing new begins and what runs is given up.
    """

    def __init__(
        self,
        setting: Setting,
        load: Load,
        only: Sequence[str],
        logs: Path,
        caches: Path,
        ends: float,
        results: Results,
        save: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._setting = setting
        self._load = load
        self._only = only
        self._logs = logs
        self._caches = caches
        self._ends = ends
        self._results = results
        self._save = save
        self._say = say

    async def run(self) -> None:
        if len(self._setting.gpus) >= 2:
            await self._section("raw", self._raw)
            await self._section("agents", self._agents)
        if not set(self._only) - {"raw", "agents"}:
            return
        for wave in waves(groups(self._setting), self._setting.gpus):
            await self._wave(wave)

    async def _wave(self, wave: Sequence[Group]) -> None:
        names = ", ".join(group.name for group in wave)
        left = self._ends - time.monotonic()
        if left <= 0:
            return self._missing(f"engines of {names}", "the session's time was over")
        self._say(f"starting the engines of {names}")
        began = time.monotonic()
        specs = [spec for group in wave for spec in group.specs]
        fleet = Fleet(self._logs, self._caches)
        async with fleet.start(specs, min(self._setting.start_seconds, left)) as (engines, why):
            took = time.monotonic() - began
            self._say(f"{', '.join(engines) or 'no engine'} up after {took:.0f} s")
            self._results.about[f"start of {names}"] = f"{took:.0f} s"
            for name, reason in why.items():
                self._say(f"{name} did not start: {reason[:300]}")
                self._missing(f"engine {name}", reason[:300])
            if engines:
                await self._measure(engines)

    async def _measure(self, engines: dict[str, Engine]) -> None:
        compared, splits = _systems(engines, self._load.output)
        reshaped = _reshaped(engines)
        await self._section("latency", partial(self._latency, compared, reshaped))
        for split in [*splits, *reshaped]:
            await self._section("unhidden", partial(self._unhidden, split))
        if splits and not self._results.steps:
            await self._section("steps", partial(self._steps, splits[0]))
        for split in splits:
            ones: list[System] = [
                Whole(PREFILL_ALONE, split.prefill),
                Whole("pdserve, decode's engine alone", split.decode),
            ]
            if "one" in engines:
                ones.append(Whole(ONE, engines["one"]))
            await self._section("exact", partial(self._exact, split, ones, False))
        for split in reshaped:
            alone: list[System] = [Whole("pdserve, decode's engine alone", split.decode)]
            await self._section("exact", partial(self._exact, split, alone, True))
        ours = [engine for engine in engines.values() if engine.info is not None]
        await self._section("ledgers", partial(self._ledgers, ours))

    async def _section(self, name: str, measure: Callable[[], Awaitable[None]]) -> None:
        """Runs a section that was asked for; its failure is a row and no more."""
        if name in SECTIONS and name not in self._only:
            return
        left = min(SECTION_SECONDS.get(name, 60), self._ends - time.monotonic())
        if left <= 0:
            return self._missing(name, "the session's time was over")
        began = time.monotonic()
        try:
            async with asyncio.timeout(left) as limit:
                await measure()
        except Exception as error:
            late = limit.expired()
            why = f"not done within {left:.0f} s" if late else f"{type(error).__name__}: {error}"
            self._missing(name, why[:500])
        self._say(f"{name}: {time.monotonic() - began:.1f} s")
        self._save()

    def _missing(self, what: str, why: str) -> None:
        self._say(f"{what}: {why}")
        self._results.missing.append(Missing(what, why))

    # ---- sections ----------------------------------------------------------------------------

    async def _raw(self) -> None:
        sizes = [n * self._load.kv_bytes_per_token for n in self._load.prompts]
        for prompt, size, seconds in zip(
            self._load.prompts, sizes, await raw_sends(sizes), strict=True
        ):
            rate = size / seconds / (1 << 30)
            self._results.raw.append(RawSend(prompt, size / MIB, 1000 * seconds, rate))

    async def _agents(self) -> None:
        sizes = [n * self._load.kv_bytes_per_token for n in self._load.prompts]
        for prompt, took in zip(self._load.prompts, await agent_sends(sizes), strict=True):
            self._results.agents.append(AgentSend(prompt, took))

    async def _latency(
        self, compared: Sequence[tuple[System, int]], reshaped: Sequence[System]
    ) -> None:
        load = self._load
        everyone = [*compared, *((system, load.output) for system in reshaped)]

        def keep(rows: Sequence[Latency]) -> None:
            self._results.latency.extend(rows)
            self._save()

        broken = await latencies(everyone, load.prompts, load.runs, load.vocab, keep, self._say)
        for name, why in broken.items():
            self._missing(name, why)

    async def _unhidden(self, split: Split) -> None:
        load = self._load
        async for row in unhidden(split, load.prompts, load.runs, load.vocab):
            self._results.unhidden.append(row)

    async def _steps(self, split: Split) -> None:
        load = self._load
        row = await steps(
            split, load.batch, load.batch_context, load.batch_tokens, load.inbound, load.rounds,
            load.span_seconds, load.vocab,
        )  # fmt: skip
        self._results.steps.append(row)

    async def _exact(self, split: Split, ones: Sequence[System], reshaped: bool) -> None:
        rows, blocks, controls = await exactness(
            split, ones, self._load.exact_prompts, self._load.vocab, reshaped
        )
        self._results.exact += rows
        self._results.blocks += blocks
        self._results.controls += controls

    async def _ledgers(self, ours: Sequence[Engine]) -> None:
        self._results.ledgers += await ledgers(ours)


def _systems(
    engines: dict[str, Engine], output: int
) -> tuple[list[tuple[System, int]], list[Split]]:
    """What is compared, each with its tokens to generate, and pdserve's splits among it."""
    compared: list[tuple[System, int]] = []
    splits = []
    if one := engines.get("one"):
        compared += [(Whole(PREFILL, one), 1), (Whole(ONE, one), output)]
    if (p := engines.get("nixl-prefill")) and (d := engines.get("nixl-decode")):
        compared.append((NixlSplit(NIXL, p, d), output))
    for transport, name in (("nccl", NCCL), ("grpc", GRPC)):
        p, d = engines.get(f"{transport}-prefill"), engines.get(f"{transport}-decode")
        if p and d:
            splits.append(Split(name, p, d))
            compared.append((Whole(f"{name}, prefill alone", p), 1))
    return [*compared, *((split, output) for split in splits)], splits


def _reshaped(engines: dict[str, Engine]) -> list[Split]:
    """Splits between one card and two, both ways."""
    made = []
    for transport, name in (("nccl", NCCL), ("grpc", GRPC)):
        over_two, over_one = engines.get(f"{transport}-tp2"), engines.get(f"{transport}-prefill")
        if over_two and over_one:
            made.append(Split(f"{name} TP2→TP1", over_two, over_one))
            made.append(Split(f"{name} TP1→TP2", over_one, over_two))
    return made
