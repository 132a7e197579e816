"""Requests that come as they come, whatever becomes of those before them; what each met with."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import grpc.aio

from bench.streams.clients import Client, RefusedError, Seen, Times
from bench.streams.setting import LOAD, PROMPT
from cluster.rpc.client import CallFailed

TTFT_SECONDS, TPOT_SECONDS = 2.0, 0.1
REFUSAL_SECONDS = 0.05
PROMPTS = (2, 12)
OUTPUT_TOKENS = (16, 80)
"""Of a request, drawn evenly: so many times PROMPT, and so many tokens."""

TIMEOUT_SECONDS = 10.0
"""Then a client gives up: it has its answer in twice its targets, or not at all."""


_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Outcome:
    """What one request met with.

    Attributes:
        at: when it came, in seconds from the load's beginning.
        seconds: until it ended, in whatever way.
        times: None: it was refused, or failed.
    """

    at: float
    seconds: float
    output: int
    times: Times | None = None
    refused: bool = False

    @property
    def tpot(self) -> float:
        """Seconds per token after the first."""
        assert self.times is not None
        return (self.times.last - self.times.first) / (self.output - 1)

    @property
    def missed(self) -> str:
        """Why it does not count; empty if it does."""
        if self.times is None:
            return "refused" if self.refused else "failed"
        if self.times.first > TTFT_SECONDS:
            return "ttft"
        return "tpot" if self.tpot > TPOT_SECONDS else ""


@dataclass(frozen=True)
class LoadRow:
    """What a system made of a load.

    Attributes:
        load: offered, as a multiple of the capacity.
        goodput_per_s: requests that met both targets.
        attainment: their share of everything offered.
        missed: how many did not, by reason.
        refusal_ms: until a refusal was there.
        refusals_late: how many took longer than REFUSAL_SECONDS.
        core_share: used of the system's core, and of the one of engines and clients.
    """

    system: str
    load: float
    offered_per_s: float
    goodput_per_s: float
    attainment: float
    refused_share: float
    missed: dict[str, int]
    refusal_ms: dict[str, float]
    refusals_late: int
    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    core_share: dict[str, float]

    @classmethod
    def of(
        cls,
        system: str,
        load: float,
        seconds: float,
        seen: Sequence[Outcome],
        core_share: dict[str, float],
    ) -> LoadRow:
        """Of everything that came in so many seconds."""
        missed = dict.fromkeys(("refused", "ttft", "tpot", "failed"), 0)
        for outcome in seen:
            if outcome.missed:
                missed[outcome.missed] += 1
        good = len(seen) - sum(missed.values())
        refusals = [o.seconds for o in seen if o.refused]
        served = [o for o in seen if o.times is not None]
        return cls(
            system,
            load,
            round(len(seen) / seconds, 2),
            round(good / seconds, 2),
            round(good / max(1, len(seen)), 4),
            round(len(refusals) / max(1, len(seen)), 4),
            missed,
            _quantiles(refusals),
            sum(r > REFUSAL_SECONDS for r in refusals),
            _quantiles([o.times.first for o in served if o.times]),
            _quantiles([o.tpot for o in served]),
            core_share,
        )

    def values(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        def pair(of: dict[str, float]) -> str:
            return f"{of['p50']:.0f}/{of['p99']:.0f}" if of else "-"

        return (
            f"{self.system:14} {self.load:5.2f}x {self.offered_per_s:6.1f} offered/s "
            f"{self.goodput_per_s:6.1f} good/s {100 * self.attainment:5.1f} % attained, missed "
            + " ".join(f"{why} {count}" for why, count in self.missed.items())
            + f"; refusals {pair(self.refusal_ms)} ms, {self.refusals_late} late; TTFT "
            f"{pair(self.ttft_ms)}, TPOT {pair(self.tpot_ms)} ms; cores "
            + " ".join(f"{who} {100 * share:.0f} %" for who, share in self.core_share.items())
        )


class Requests:
    """Requests one after the other; no two of a process have a block of their prompts in common,
    so no prefix cache helps.

    Attributes:
        seen: of those that have ended.
    """

    def __init__(
        self,
        client: Client,
        seed: int,
        prompts: tuple[int, int] = PROMPTS,
        output_tokens: tuple[int, int] = OUTPUT_TOKENS,
    ) -> None:
        self._client = client
        self._random = random.Random(seed)
        self._prompts, self._output_tokens = prompts, output_tokens
        self.seen = Seen()

    async def one(self, began: float) -> Outcome:
        """Asks, and waits for the end; `began` is the load's beginning."""
        prompt = f"{next(_NUMBERS):012d}\n" + PROMPT * self._random.randint(*self._prompts)
        output = self._random.randint(*self._output_tokens)
        came, seen = time.perf_counter(), Seen()
        times, refused = None, False
        try:
            times = await self._client.run(LOAD, output, seen, prompt)
        except RefusedError:
            refused = True
        except (TimeoutError, grpc.aio.AioRpcError, aiohttp.ClientError, CallFailed):
            pass
        ended = time.perf_counter() - came
        self.seen.tokens += seen.tokens
        self.seen.messages += seen.messages
        self.seen.wrong += seen.wrong
        whole = None if seen.wrong else times
        return Outcome(came - began, ended, output, whole, refused)

    async def capacity(self, at_once: int, seconds: float, warm_up: float) -> float:
        """Requests a second that end, with so many under way at any time."""
        began = time.perf_counter()
        ends: list[float] = []

        async def again() -> None:
            while True:
                outcome = await self.one(began)
                if outcome.times is not None:
                    ends.append(outcome.at + outcome.seconds)

        tasks = [asyncio.create_task(again()) for _ in range(at_once)]
        await asyncio.sleep(warm_up + seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return sum(warm_up <= end < warm_up + seconds for end in ends) / seconds

    async def arrive(self, per_second: float, seconds: float) -> list[Outcome]:
        """What became of those that came in so many seconds (a Poisson process), all ended."""
        began = time.perf_counter()
        tasks: list[asyncio.Task[Outcome]] = []
        due = self._random.expovariate(per_second)
        async with asyncio.TaskGroup() as group:
            while due < seconds:
                await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
                tasks.append(group.create_task(self.one(began)))
                due += self._random.expovariate(per_second)
        return [task.result() for task in tasks]


def _quantiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds; empty if there are none."""
    if not seconds:
        return {}
    order = sorted(seconds)
    at = {"p50": len(order) // 2, "p99": min(len(order) - 1, len(order) * 99 // 100)}
    return {name: round(1e3 * order[i], 1) for name, i in at.items()}
