"""The options' answers put together: the best, what the second loses, what would change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.advisor.contest import Run, Task, contest
from cluster.advisor.evaluate import Verdict, goodput_on, mixed, roughly
from cluster.advisor.question import Floor, Option, Question, check_reachable
from cluster.planner.efficiency import Cost, cost_per_request
from cluster.simulator.goodput import Goal
from cluster.simulator.outcome import Targets
from cluster.simulator.workload import mean_rate

RIVALS = 2
"""Options beside the best one whose sensitivity to the traffic is simulated."""


@dataclass(frozen=True)
class Sensitivity:
    """If the targets or the traffic were other than stated.

    Attributes:
        change: in words.
        best: the option that would be best then.
        goodput: its goodput, and `kept` that of the option advised now.
    """

    change: str
    best: Option
    goodput: float
    kept: float


@dataclass(frozen=True)
class Advice:
    """The answer.

    Attributes:
        verdicts: best first.
        second_loses: the share of the best one's goodput that the second best lacks; None if there
            is no second.
        costs: dollars per request at each option's goodput, in the order of `verdicts`.
        rate: of the trace, requests/s.
    """

    question: Question
    floor: Floor
    rate: float
    verdicts: tuple[Verdict, ...]
    costs: tuple[Cost, ...]
    second_loses: float | None
    sensitivity: tuple[Sensitivity, ...]

    @property
    def best(self) -> Verdict:
        return self.verdicts[0]


def advise(question: Question, run: Run, exhaustive: bool = False) -> Advice:
    """Answers the question.

    Args:
        exhaustive: runs every option in full, which changes neither the best nor the second best.

    Raises:
        InvalidRequest: an idle worker misses the targets, or there is no whole worker.
    """
    least = check_reachable(question.performance, question.arrivals, question.goal)
    verdicts = contest(question, run, exhaustive)
    sensitivity = [*_of_targets(question, verdicts), *_of_traffic(question, verdicts, run)]
    return Advice(
        question,
        least,
        mean_rate(question.arrivals),
        tuple(verdicts),
        tuple(_cost(question, verdict) for verdict in verdicts),
        _second_loses(verdicts),
        tuple(sensitivity),
    )


def _second_loses(verdicts: Sequence[Verdict]) -> float | None:
    if len(verdicts) < 2:
        return None
    first, second = verdicts[0].goodput, verdicts[1].goodput
    return (first - second) / first if first > 0 else 0.0


def _cost(question: Question, verdict: Verdict) -> Cost:
    gpus, option = question.performance.gpus, verdict.option
    prefill = option.prefill + option.both * verdict.prefill_busy
    decode = option.decode + option.both * (1 - verdict.prefill_busy)
    return cost_per_request(
        question.dollars_per_hour, prefill * gpus, decode * gpus, verdict.goodput
    )


def _of_targets(question: Question, verdicts: Sequence[Verdict]) -> list[Sensitivity]:
    """From the curves that are there already: the same runs, judged by other targets."""
    now, found = question.goal.targets, []
    for change, targets in (
        ("TTFT target halved", Targets(now.ttft / 2, now.tpot)),
        ("TTFT target doubled", Targets(now.ttft * 2, now.tpot)),
        ("TPOT target halved", Targets(now.ttft, now.tpot / 2)),
        ("TPOT target doubled", Targets(now.ttft, now.tpot * 2)),
    ):
        goal = Goal(targets, question.goal.share)
        values = [goodput_on(verdict.curve, goal) for verdict in verdicts]
        best = max(range(len(values)), key=values.__getitem__)
        found.append(Sensitivity(change, verdicts[best].option, values[best], values[0]))
    return found


def _of_traffic(question: Question, verdicts: Sequence[Verdict], run: Run) -> list[Sensitivity]:
    limit = question.shape.max_model_len
    changes = {
        "prompts twice as long": mixed(question.arrivals, 2.0, 1.0, limit),
        "outputs twice as long": mixed(question.arrivals, 1.0, 2.0, limit),
    }
    options = _neighbours(verdicts)
    groups = [[o for o in options if not o.both], [o for o in options if o.both]]
    questions = [replace(question, arrivals=tuple(traffic)) for traffic in changes.values()]
    tasks: list[Task] = [(roughly, (each, some)) for some in groups if some for each in questions]
    values: list[list[Verdict]] = [[] for _ in changes]
    for number, verdicts_of_some in enumerate(run(tasks)):
        assert isinstance(verdicts_of_some, list)
        values[number % len(changes)] += verdicts_of_some
    found = []
    for change, of_change in zip(changes, values, strict=True):
        best = max(of_change, key=lambda verdict: verdict.goodput)
        (kept,) = (v.goodput for v in of_change if v.option == options[0])
        found.append(Sensitivity(change, best.option, best.goodput, kept))
    return found


def _neighbours(verdicts: Sequence[Verdict]) -> list[Option]:
    """The best option first, then its rivals: the splits beside it, and aggregated."""
    best = verdicts[0].option
    rivals = [v.option for v in verdicts[1:] if v.option.both]
    rivals += [
        v.option
        for v in verdicts[1:]
        if not v.option.both and abs(v.option.prefill - best.prefill) <= 1 and not best.both
    ]
    return [best, *rivals[:RIVALS]]
