"""The loads of `pdserve bench`: an open loop, in which requests come as they come, and a closed
one, in which so many are under way at any time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from cluster.cli.bench_client import Client
from cluster.cli.bench_load import CLASSES, Prompts
from cluster.cli.bench_request import Meter, request_of
from cluster.cli.bench_seen import ClientTimes, Run, Seen
from cluster.simulator.outcome import Targets
from cluster.simulator.workload import Arrival

TICK_SECONDS = 0.01
"""Between two looks at how late the client's own turns are."""
TELL_SECONDS = 0.25
BEHIND_SECONDS = 2.0
"""A client so far behind sends nothing more once the time is over: what it sent was offered."""
RETRY_SECONDS = (0.05, 5.0)
"""The least and the most that a closed loop waits after a refusal."""


@dataclass(frozen=True)
class Load:
    """One load.

    Attributes:
        words: what it is.
        asked: the requests, as they come; of a closed loop, one after another.
        rate: requests a second, if it has one.
        concurrency: of a closed loop; 0: an open one.
        warm_up: what comes in so many first seconds is not counted.
        seconds, requests: what is measured ends after so many; None: with `asked`.
        slo_class: of requests whose trace names none.
        targets: by class, of those that have any.
        own_targets: requests bring the targets along, in place of their class's.
    """

    words: str
    asked: Iterable[Arrival]
    rate: float | None
    concurrency: int
    warm_up: float
    seconds: float | None
    requests: int | None
    slo_class: str
    targets: Mapping[str, Targets]
    own_targets: bool = False


class Runner:
    """Runs one load.

    Args:
        prompts: the requests' tokens.
        salt: of their prefixes: no cache knows them from another run.
        stop: set to end it before its time.
        tell: hears how it goes.
    """

    def __init__(
        self,
        client: Client,
        meter: Meter,
        model: str,
        prompts: Prompts,
        salt: str,
        load: Load,
        stop: asyncio.Event,
        tell: Callable[[str], None],
    ) -> None:
        self._client = client
        self._meter = meter
        self._model = model
        self._prompts = prompts
        self._salt = salt
        self._load = load
        self._stop = stop
        self._tell = tell
        self._asked: Iterator[tuple[int, Arrival]] = zip(count(), load.asked, strict=False)
        self._seen: list[Seen] = []
        self._ends = Counter[str]()
        self._counted = self._under_way = 0
        self._began = self._opened = self._closed = 0.0
        self._cpu = 0.0
        """That was taken before it was opened; after it was closed, while it was open."""
        self._time_is_over = asyncio.Event()

    async def run(self) -> Run:
        """To its end, and to that of every request it has begun, unless it is stopped."""
        load, turns = self._load, list[float]()
        self._began = time.perf_counter()
        helpers = [asyncio.create_task(each) for each in (self._turns(turns), self._progress())]
        try:
            await self._measured(self._closed_loop() if load.concurrency else self._open_loop())
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        late = [each.late for each in self._seen if each.late is not None]
        seconds = max(0.0, self._closed - self._opened) if self._opened else 0.0
        return Run(
            load.words,
            load.rate,
            seconds,
            self._seen,
            self._meter.prompt_tokens,
            self._meter.output_tokens,
            ClientTimes.of(turns, late, TICK_SECONDS, self._cpu / seconds if seconds else 0.0),
            load.targets,
            self._under_way if self._stop.is_set() else 0,
            self._stop.is_set(),
        )

    async def _measured(self, loop: Awaitable[Any]) -> None:
        """Opens the meter after the warm-up; closes it at the end of its time or of the load."""
        running = asyncio.ensure_future(loop)
        stopped = asyncio.create_task(self._stop.wait())
        timers = [asyncio.get_running_loop().call_later(self._load.warm_up, self._open)]
        if self._load.seconds is not None:
            whole = self._load.warm_up + self._load.seconds
            timers.append(asyncio.get_running_loop().call_later(whole, self._close))
        try:
            await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
            self._close()
            if not running.done():
                running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        finally:
            for timer in timers:
                timer.cancel()
            for task in (running, stopped):
                task.cancel()
            await asyncio.gather(running, stopped, return_exceptions=True)

    def _open(self) -> None:
        self._opened, self._cpu = time.perf_counter(), time.process_time()
        self._meter.open = True

    def _close(self) -> None:
        if not self._closed:
            self._closed, self._cpu = time.perf_counter(), time.process_time() - self._cpu
            self._meter.open = False
            self._time_is_over.set()

    def _over(self, at: float) -> bool:
        """Nothing more comes, `at` seconds after the beginning."""
        load = self._load
        late = load.seconds is not None and at >= load.warm_up + load.seconds
        return late or self._counted == load.requests

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, asked in self._asked:
                if self._counted == self._load.requests:
                    break
                if self._over(asked.at):
                    await self._time_is_over.wait()
                    break
                request = self._request(asked, number)
                due = self._began + asked.at
                # Whoever is behind lets the others work, too: answers would wait for all requests.
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if self._closed and time.perf_counter() - due > BEHIND_SECONDS:
                    break
                counts = asked.at >= self._load.warm_up
                self._counted += counts
                group.create_task(self._one(asked, request, due, counts))

    async def _closed_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.concurrency):
                group.create_task(self._again_and_again())

    async def _again_and_again(self) -> None:
        load = self._load
        for number, asked in self._asked:
            at = time.perf_counter() - self._began
            if self._over(at):
                break
            counts = at >= load.warm_up
            self._counted += counts
            retry = await self._one(asked, self._request(asked, number), None, counts)
            at = time.perf_counter() - self._began
            if retry is not None and not self._over(at):
                least, most = RETRY_SECONDS
                left = math.inf if load.seconds is None else load.warm_up + load.seconds - at
                await asyncio.sleep(min(most, max(least, retry), left))

    async def _one(
        self, asked: Arrival, request: Any, due: float | None, counts: bool
    ) -> float | None:
        """Returns when one that was refused or failed may come again."""
        self._under_way += counts
        seen, retry = await self._client.ask(request, due)
        self._under_way -= counts
        if counts:
            self._seen.append(replace(seen, slo_class=self._class_of(asked)))
            self._ends[seen.end] += 1
        return None if seen.end == "ok" else retry

    def _request(self, asked: Arrival, number: int) -> Any:
        ids = self._prompts.ids(asked, number)
        slo_class = self._class_of(asked)
        own = self._load.targets[slo_class] if self._load.own_targets else None
        return request_of(self._model, ids, asked.output, slo_class, self._salt, own)

    def _class_of(self, asked: Arrival) -> str:
        return asked.kind if asked.kind in CLASSES else self._load.slo_class

    async def _turns(self, late: list[float]) -> None:
        """How late the event loop comes back to somebody who waits, since it measures."""
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            if self._opened:
                late.append(max(0.0, time.perf_counter() - due))

    async def _progress(self) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            since = time.perf_counter() - self._began - self._load.warm_up
            if since < 0:
                self._tell(f"{self._load.words}: warming up, {-since:.0f} s left")
                continue
            ends = self._ends
            bad = "".join(f", {ends[e]} {e}" for e in ("refused", "failed") if ends[e])
            of = "" if self._load.seconds is None else f" of {self._load.seconds:.0f}"
            measured = (self._closed or time.perf_counter()) - self._opened
            rate = self._meter.output_tokens / max(TELL_SECONDS, measured)
            self._tell(
                f"{self._load.words}: {since:.0f}{of} s, {ends['ok']} ok{bad}, "
                f"{self._under_way} under way, {rate:,.0f} output tokens/s"
            )
