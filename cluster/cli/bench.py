"""`pdserve bench`: loads a cluster that runs, through its own API, and says what it served."""

from __future__ import annotations

import asyncio
import gc
import math
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import uvloop

from cluster.cli import bench_load as loads
from cluster.cli.access import channel
from cluster.cli.bench_client import Client, Served, served_model
from cluster.cli.bench_report import show, values
from cluster.cli.bench_request import Meter
from cluster.cli.bench_run import Load, Runner
from cluster.cli.bench_seen import Run
from cluster.cli.calls import cluster_view
from cluster.cli.plan_calls import Values, plan_view
from cluster.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Terminal
from cluster.errors import InvalidRequest, PdserveError
from cluster.simulator.outcome import Targets, parse_slo
from cluster.simulator.traces import read_trace
from cluster.simulator.workload import Arrival, mean_rate

SECONDS, WARM_UP_SECONDS, CONCURRENCY = 30.0, 3.0, 4
"""Unless they are asked for otherwise; a trace has no warm-up."""
UNLIMITED_TOKENS = 1 << 30
"""A prompt's and its answer's, of a model that does not say how many it takes."""
MOST = {"burstiness": 100.0, "timeout": 86400.0}
"""Beyond it all requests come at once; gRPC's header has eight digits, here of milliseconds."""
WITHOUT_TARGETS = "batch"
"""The class for which the plan makes targets up, so that it is served at all: routers have none."""


@dataclass(frozen=True)
class Wanted:
    """The command line's options; None and empty: not given."""

    model: str = ""
    rates: tuple[float, ...] = ()
    burstiness: float = 1.0
    concurrency: int | None = None
    trace: Path | None = None
    speed: float = 1.0
    requests: int | None = None
    seconds: float | None = None
    warm_up: float | None = None
    prompt: loads.Lengths | None = None
    output: loads.Lengths | None = None
    shared: int = 0
    slo_class: str = "standard"
    slo: str = ""
    own_targets: bool = False
    seed: int = 1
    timeout: float = 60.0
    may_fail: float = 0.0

    def __post_init__(self) -> None:
        """Raises InvalidRequest where options contradict each other."""
        ways = {"rate": self.rates, "concurrency": self.concurrency, "trace": self.trace}
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise InvalidRequest(given[1], f"--{given[0]} says already when requests come")
        if self.slo_class not in loads.CLASSES:
            known = ", ".join(loads.CLASSES)
            raise InvalidRequest("class", f"{self.slo_class!r} is none of {known}")
        if self.trace is not None and (self.prompt or self.output or self.shared):
            raise InvalidRequest("trace", "it has the lengths and the prefixes of its requests")
        if self.own_targets and not self.slo:
            raise InvalidRequest("own-targets", "give them: --slo ttft=…,tpot=…")
        for name in ("burstiness", "timeout", "speed", "seconds", "warm_up", "may_fail"):
            value, most = getattr(self, name), MOST.get(name, math.inf)
            if value is not None and not (math.isfinite(value) and value <= most):
                told = f"at most {most:g}" if name in MOST else "a number"
                raise InvalidRequest(name.replace("_", "-"), f"must be {told}, not {value:g}")


def run(
    terminal: Terminal,
    addresses: tuple[str, ...],
    operator: tuple[str, str],
    known: str,
    wanted: Wanted,
    as_json: bool,
) -> int:
    """Exits 1 if nothing was served, or if more than `may_fail` of a load was refused or failed.

    Args:
        addresses: of routers; empty: of all that the cluster has.
        operator: where the Operator API is, and what opens it, if it is this host's cluster; else
            PDSERVE_TOKEN may. Routers and the classes' targets are asked for there, if none are
            given; it may be out of reach.
        known: of the router that is asked where there are no `addresses` and it is out of reach.
    """
    targets = parse_slo(wanted.slo) if wanted.slo else None
    with terminal.err.status("asking for the model") as status:
        bench = Bench(addresses, operator, known, wanted, targets, status.update)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runs = runner.run(bench.run())
    if as_json:
        terminal.json(values(bench.addresses, bench.model, runs))
    else:
        show(terminal.for_tables, bench.addresses, bench.model, runs)
    if any(each.interrupted for each in runs):
        return EXIT_INTERRUPTED
    if wrong := shortfall(runs, wanted.may_fail):
        terminal.err.print(wrong, markup=False)
        return EXIT_FAILED
    return EXIT_OK


def shortfall(runs: Sequence[Run], may_fail: float) -> str:
    """What is wrong with the runs as a whole, in words; empty: nothing is.

    Args:
        may_fail: the share of each run's requests that may be refused or fail.
    """
    if not any(run.count("ok") for run in runs):
        return "no request was served"
    over = [run for run in runs if run.unserved_share > may_fail]
    if not over:
        return ""
    worst = max(over, key=lambda run: run.unserved_share)
    where = f" in {len(over)} of {len(runs)} loads" if len(runs) > 1 else ""
    return (
        f"more was refused or failed{where} than --may-fail lets pass, {may_fail:.2%}: "
        f"{worst.unserved_share:.2%} of {len(worst.seen)} requests"
    )


class Bench:
    """Runs the loads one after another, each after the one before has ended.

    Attributes:
        addresses, model: what they were asked of.
    """

    def __init__(
        self,
        addresses: tuple[str, ...],
        operator: tuple[str, str],
        known: str,
        wanted: Wanted,
        targets: Targets | None,
        tell: Callable[[str], None],
    ) -> None:
        self.addresses = addresses
        self._operator = operator
        self._known = known
        self._wanted = wanted
        self._targets: Mapping[str, Targets] | None = None
        if targets is not None:
            self._targets = dict.fromkeys(self._classes, targets)
        self._tell = tell
        self._shape: loads.Shape | None = None
        self.model = wanted.model

    async def run(self) -> list[Run]:
        """What came of them; of an interrupted one, what it had seen.

        Raises:
            PdserveError: the model cannot be asked, or not so.
        """
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def interrupted() -> None:
            stop.set()
            loop.remove_signal_handler(signal.SIGINT)  # The next one ends it at once.

        if not self.addresses:
            self.addresses = await self._routers()
        model = await served_model(self.addresses, self._wanted.model)
        self.model = model.name
        if self._targets is None:
            self._targets = await self._class_targets()
        prompts = self._prompts(model)
        loop.add_signal_handler(signal.SIGINT, interrupted)
        gc.freeze()  # Looking through all that was imported would hold up what is measured.
        runs: list[Run] = []
        try:
            for load in self._loads(model):
                meter = Meter()
                async with Client(self.addresses, self._wanted.timeout, meter) as client:
                    salt = secrets.token_hex(8)
                    runs.append(
                        await Runner(
                            client, meter, model.name, prompts, salt, load, stop, self._tell
                        ).run()
                    )
                if stop.is_set():
                    break
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        return runs

    @property
    def _classes(self) -> tuple[str, ...]:
        """That requests may be of: a trace names them."""
        return loads.CLASSES if self._wanted.trace is not None else (self._wanted.slo_class,)

    async def _routers(self) -> tuple[str, ...]:
        """All of them: each admits its share of what the cluster can take."""
        address, token = self._operator
        try:
            async with channel(address, token, ours=True) as to:
                view = await cluster_view(to)
        except PdserveError:
            return (self._known,)
        return tuple(router.grpc_address for router in view.routers)

    async def _class_targets(self) -> dict[str, Targets]:
        """As the cluster has them now; none where that cannot be asked."""
        address, token = self._operator
        try:
            async with channel(address, token, ours=True) as to:
                plan = await plan_view(to)
        except PdserveError:
            return {}
        return class_targets(plan, self.model, self._classes)

    def _prompts(self, model: Served) -> loads.Prompts:
        wanted = self._wanted
        if wanted.trace is None:
            lengths = loads.default_lengths(wanted.prompt, wanted.output, model.max_model_len)
            self._shape = loads.Shape(*lengths, wanted.shared)
            self._shape.check(model.max_model_len)
        return loads.Prompts(model.vocab, wanted.seed, wanted.shared)

    def _loads(self, model: Served) -> Iterator[Load]:
        wanted, shape = self._wanted, self._shape
        warm_up = wanted.warm_up
        if warm_up is None:
            warm_up = 0.0 if wanted.trace else WARM_UP_SECONDS
        seconds = wanted.seconds
        if seconds is None and wanted.requests is None and wanted.trace is None:
            seconds = SECONDS
        load = Load(
            "", (), None, 0, warm_up, seconds, wanted.requests, wanted.slo_class,
            self._targets or {}, wanted.own_targets,
        )  # fmt: skip
        if wanted.trace is not None:
            longest = model.max_model_len or UNLIMITED_TOKENS
            trace = read_trace(wanted.trace, longest, wanted.seed)
            arrivals = list(loads.sped(trace.arrivals, wanted.speed))
            words = f"{trace.name} at {mean_rate(arrivals):.3g} requests/s"
            yield replace(load, words=words, asked=self._whole(arrivals, warm_up))
            return
        assert shape is not None
        if not wanted.rates:
            at_once = wanted.concurrency or CONCURRENCY
            words, asked = f"{at_once} at a time", loads.drawn(shape, wanted.seed)
            yield replace(load, words=f"{words}, {shape}", asked=asked, concurrency=at_once)
        for rate in wanted.rates:
            asked = loads.arriving(shape, rate, wanted.burstiness, wanted.seed)
            words = f"{rate:g} requests/s, {shape}"
            yield replace(load, words=words, asked=asked, rate=rate)

    def _whole(self, arrivals: list[Arrival], warm_up: float) -> Iterator[Arrival]:
        """Raises InvalidRequest if the warm-up takes all of it."""
        if arrivals[-1].at < warm_up:
            raise InvalidRequest("warm-up", f"the trace is over after {arrivals[-1].at:.1f} s")
        return chain(arrivals)


def class_targets(plan: Values, model: str, classes: tuple[str, ...]) -> dict[str, Targets]:
    """Of a model in GetPlan's answer, by class, of those that have any."""
    return {
        name: Targets(of["ttft_seconds"], of["tpot_seconds"])
        for each in plan["models"]
        if each["model"] == model
        for name, of in each["targets"].items()
        if name in classes and name != WITHOUT_TARGETS
    }
