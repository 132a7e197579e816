"""`pdserve demo`: a whole cluster on this machine, from nothing to served to gone."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import grpc.aio

from cluster.cli.access import channel
from cluster.cli.calls import ClusterView, Delta, Prompt, cluster_view, generate
from cluster.cli.checks import before_start
from cluster.cli.launch import Cluster
from cluster.cli.progress import Progress
from cluster.cli.rundir import RunDir
from cluster.cli.supervise import supervise
from cluster.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Terminal
from cluster.cli.timeline import Served, show, spoken_bytes
from cluster.config import Config
from cluster.errors import ConfigError, EngineFailed, PdserveError

LEDGER_SECONDS = 5.0
DRAIN_SECONDS = 5.0
REQUEST_SECONDS = 120.0
SEED = 7
SHORT_FACTS, LONG_FACTS, CHAT_FACTS = 6, 90, 10


@dataclass(frozen=True)
class Question:
    """One request of the demo and the only right answer."""

    title: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Answer:
    """What came back."""

    title: str
    text: str
    expected: str
    right: bool
    served: Served


def demo(terminal: Terminal, config: Config, as_json: bool) -> None:
    """Runs it all; exits 0 only if all answers were right, all ledgers at 0 and nothing is left."""
    rundir = RunDir(config.name)

    async def work() -> int:
        rundir.acquire()
        before_start(config)
        questions = make_questions(_recall_task())
        terminal.keep_for_ourselves(rundir.logs / "cli.log")
        return await _run(terminal, config, rundir, questions, as_json)

    supervise(terminal, work)


async def _run(
    terminal: Terminal, config: Config, rundir: RunDir, questions: list[Question], as_json: bool
) -> int:
    answers: list[Answer] = []
    ledger: ClusterView | None = None
    interrupted, error = False, None
    say = terminal.err if as_json else terminal.out
    with Progress(terminal.err) as progress:
        cluster = Cluster(config, rundir, progress)
        try:
            status = await cluster.start()
        except asyncio.CancelledError:
            interrupted = True
        except Exception as failure:
            error = failure
    if not interrupted and error is None:
        router = next(slot for slot in status.slots if slot.kind == "router")
        shown = None if as_json else terminal
        try:
            async with channel(router.grpc_address) as to:
                for question in questions:
                    answers.append(await _ask(shown, to, question))
            async with channel(router.operator_address) as to:
                ledger = await _ledger(to)
        except asyncio.CancelledError:
            interrupted = True
        except Exception as failure:
            error = failure
    with Progress(terminal.err) as progress:
        cluster.show_on(progress)
        left = await cluster.stop(DRAIN_SECONDS if ledger is not None else 0.0)
    if interrupted:
        return EXIT_INTERRUPTED
    if error is not None or ledger is None:
        return terminal.fail(error or EngineFailed("the demo did not finish"))
    right = all(answer.right for answer in answers)
    clean = not _held(ledger)
    if as_json:
        terminal.json(
            {
                "ok": right and clean and not left,
                "answers": [asdict(answer) for answer in answers],
                "ledgers_at_zero": clean,
                "workers": [asdict(worker) for worker in ledger.workers],
                "processes_left": left,
            }
        )
    else:
        wrong = sum(not answer.right for answer in answers)
        say.print(
            f"{_mark(right)} {len(answers) - wrong} of {len(answers)} answers right\n"
            f"{_mark(clean)} ledgers "
            + ("back at 0 on every worker" if clean else f"not at 0: {', '.join(_held(ledger))}")
            + f"\n{_mark(not left)} "
            + (f"processes were left: {', '.join(left)}" if left else "no process left behind")
        )
    return EXIT_OK if right and clean and not left else EXIT_FAILED


def make_questions(task: ModuleType) -> list[Question]:
    """A short prompt, one of several prefill chunks, the same again, and a chat."""
    rng = random.Random(SEED)
    short = task.make_case(rng, SHORT_FACTS)
    long = task.make_case(rng, LONG_FACTS, depth=0.3)
    again = Prompt(text=long.prompt, temperature=0, timeout_seconds=REQUEST_SECONDS)
    chat = task.make_case(rng, CHAT_FACTS)
    turns = tuple((m["role"], m["content"]) for m in chat.messages(system=task.SYSTEM_PROMPT))
    brief = Prompt(text=short.prompt, temperature=0, timeout_seconds=REQUEST_SECONDS)
    talk = Prompt(chat=turns, temperature=0, timeout_seconds=REQUEST_SECONDS)
    return [
        Question(f"a short prompt: {SHORT_FACTS} codes", brief, short.answer),
        Question(f"a long prompt in several chunks: {LONG_FACTS} codes", again, long.answer),
        Question("the same again: the prefix caches answer", again, long.answer),
        Question(f"a chat: {CHAT_FACTS} codes", talk, chat.answer),
    ]


async def _ask(terminal: Terminal | None, to: grpc.aio.Channel, question: Question) -> Answer:
    text, served = "", None
    last = (question.prompt.text or question.prompt.chat[-1][1]).strip().splitlines()[-1]
    if terminal is not None:
        terminal.out.print(f"\n[bold]{question.title}[/]\n  … {last}\n  ", end="")
    async for item in generate(to, question.prompt):
        match item:
            case Delta():
                text += item.text
                if terminal is not None:
                    terminal.out.print(f"[cyan]{item.text}[/]", end="")
                    terminal.out.file.flush()
            case Served():
                served = item
    if served is None:
        raise EngineFailed(f"{question.title}: the stream ended without its report")
    right = text.strip() == question.answer
    if terminal is not None:
        verdict = "[green]✓ right[/]" if right else f"[red]✗ wrong: it is {question.answer}[/]"
        terminal.out.print(f"  {verdict}")
        show(terminal.out, served)
    return Answer(question.title, text.strip(), question.answer, right, served)


async def _ledger(to: grpc.aio.Channel) -> ClusterView:
    """The workers' own counts, once they are back at 0 or `LEDGER_SECONDS` have passed."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + LEDGER_SECONDS
    while True:
        view = await cluster_view(to)
        if not _held(view) or loop.time() >= deadline:
            return view
        await asyncio.sleep(0.1)


def _held(view: ClusterView) -> list[str]:
    if not view.workers:
        return ["no worker answered"]
    return [
        f"{w.worker_id} holds {w.pinned_blocks} blocks ({spoken_bytes(w.pinned_bytes)}), "
        f"{w.running_sequences} sequences"
        for w in view.workers
        if w.pinned_blocks or w.pinned_bytes or w.running_sequences
    ]


def _mark(good: bool) -> str:
    return "[green]✓[/]" if good else "[red]✗[/]"


def _recall_task() -> ModuleType:
    given = os.environ.get("PDSERVE_EXAMPLES")
    folder = Path(given) if given else Path(__file__).resolve().parents[2] / "examples"
    path = folder / "recall_task.py"
    spec = importlib.util.spec_from_file_location("recall_task", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path} is missing: set PDSERVE_EXAMPLES to the project's examples/")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PdserveError(f"{path} cannot be loaded: {error}") from error
    return module
