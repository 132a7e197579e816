"""`pdserve plan`: the ratio advisor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.advisor.advice import Advice, advise
from cluster.advisor.evaluate import MIN_REQUESTS
from cluster.advisor.plots import plots
from cluster.advisor.pool import Pool
from cluster.advisor.question import Question
from cluster.advisor.report import report
from cluster.cli.terminal import EXIT_OK, Terminal
from cluster.errors import InvalidRequest
from cluster.planner.calibrate import calibrate
from cluster.planner.hardware import Hardware, hardware
from cluster.planner.performance import Performance
from cluster.planner.profile import Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import ModelShape, load_shape
from cluster.simulator.engine import EngineLimits
from cluster.simulator.goodput import Goal
from cluster.simulator.outcome import parse_slo
from cluster.simulator.traces import checked, read_trace
from cluster.simulator.workload import Arrival


@dataclass(frozen=True)
class Asked:
    """The command line's options; `trace` is a file, or what a cluster's journal holds."""

    trace: Path | tuple[Arrival, ...]
    model: str
    gpu: str
    gpus: int
    slo: str
    share: float
    tensor_parallel: int
    chunk: int
    price: float | None
    profile: Path | None
    seed: int


def run(terminal: Terminal, asked: Asked, plot: Path | None, as_json: bool) -> int:
    """Prints the advice."""
    question, unsorted = ask(asked)
    if plot is not None:
        try:
            plot.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest("plot", f"{plot} cannot be made: {error.strerror}") from error
    if unsorted:
        terminal.err.print(f"{unsorted} lines of the trace were out of order and were sorted in")
    if (few := len(question.arrivals)) < MIN_REQUESTS:
        terminal.err.print(
            f"the trace has {few} requests, and is repeated for runs of {MIN_REQUESTS:,} at least"
        )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=terminal.err, transient=True) as progress:
        task = progress.add_task("simulating", total=len(question.options()))

        def tell(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        with Pool(tell) as pool:
            advice = advise(question, pool.run)
    if plot is not None:
        for name, svg in plots(advice).items():
            (plot / name).write_text(svg)
    if as_json:
        terminal.json(report(advice))
    else:
        _print(terminal, advice, plot)
    return EXIT_OK


def ask(asked: Asked) -> tuple[Question, int]:
    """The question, and how many lines of the trace were out of order.

    Raises:
        InvalidRequest: names the option that is wrong.
    """
    if not 0 < asked.share < 1:
        raise InvalidRequest("share", f"{asked.share:g} is not between 0 and 1")
    shape, gpu = load_shape(asked.model), hardware(asked.gpu)
    worker = worker_performance(shape, gpu, asked.tensor_parallel, asked.profile)
    if isinstance(asked.trace, Path):
        trace = read_trace(asked.trace, shape.max_model_len, asked.seed)
    else:
        numbered = list(enumerate(asked.trace, start=1))
        trace = checked("the cluster's journal", numbered, shape.max_model_len)
    question = Question(
        shape,
        gpu,
        worker,
        asked.gpus,
        Goal(parse_slo(asked.slo), asked.share),
        trace.arrivals,
        gpu.dollars_per_hour if asked.price is None else asked.price,
        EngineLimits(max_tokens=asked.chunk),
        asked.seed,
    )
    question.options()
    return question, trace.unsorted


def worker_performance(
    shape: ModelShape, gpu: Hardware, tensor_parallel: int, profile: Path | None
) -> Performance:
    """Of one worker: measured where there is a profile, else by the data sheet."""
    start = roofline(shape, gpu, tensor_parallel)
    if profile is None:
        return start
    try:
        raw = profile.read_text()
    except OSError as error:
        raise InvalidRequest("profile", f"{profile} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("profile", f"{profile} is not text in UTF-8") from error
    measured = Profile.from_json(raw)
    measured.check(shape.name, gpu.name, tensor_parallel)
    worker = calibrate(start, measured)
    off = f"median error {worker.prefill_error.median:.0%} and {worker.decode_error.median:.0%}"
    label = f"{worker.performance.label}, {off}"
    return replace(worker.performance, label=label)


def _print(terminal: Terminal, advice: Advice, plot: Path | None) -> None:
    question, targets = advice.question, advice.question.goal.targets
    out = terminal.out
    out.print(
        f"{question.shape.name} on {question.gpus} × {question.hardware.name}: "
        f"{len(question.arrivals)} requests at {advice.rate:.2f}/s, "
        f"{targets} for {question.goal.share:.0%}; {question.performance.label}",
        markup=False,
    )
    table = Table(box=None)
    table.add_column("option", no_wrap=True)
    for name in ("goodput", "at 99 %", "met now", "TTFT ms", "TPOT ms", "P + D"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, (verdict, cost) in enumerate(zip(advice.verdicts, advice.costs, strict=True)):
        first, gap = verdict.ttft, verdict.tpot
        table.add_row(
            f"[bold green]{verdict.option}[/]" if i == 0 else str(verdict.option),
            f"{'~' if verdict.rough else ''}{verdict.goodput:.2f}",
            f"{verdict.goodput99:.2f}" if verdict.goodput99 else "–",
            f"{verdict.attainment:.1%}",
            f"{first.p50 * 1e3:.0f}/{first.p90 * 1e3:.0f}",
            f"{gap.p50 * 1e3:.1f}/{gap.p90 * 1e3:.1f}",
            f"{cost.prefill * 1e3:.3f} + {cost.decode * 1e3:.3f}",
        )
    out.print(table)
    out.print(
        "goodput in requests/s, ~: roughly; TTFT and TPOT p50/p90 at the trace's own rate; "
        "P + D: dollars per 1,000 requests at the goodput"
    )
    loses = advice.second_loses
    second = "" if loses is None else f"; the second best loses {loses:.1%}"
    out.print(f"best: [bold]{advice.best.option}[/]{second}")
    for each in advice.sensitivity:
        same = each.best == advice.best.option
        kept = "" if same else f", where {advice.best.option} has {each.kept:.2f}"
        out.print(f"  {each.change}: {each.best} with {each.goodput:.2f}/s{kept}", markup=False)
    if plot is not None:
        out.print(f"plots are in {plot}", markup=False)
