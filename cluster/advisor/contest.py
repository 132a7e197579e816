"""All options against each other, with few full runs.

First every option's goodput is found roughly. The two that look best are then run in full, on the
same requests; whoever else meets the goal on these at the second best one's goodput is run in full
too, until nobody does. So the first two are those that full runs of all would give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from cluster.advisor.evaluate import Verdict, around, evaluate, keeps_up, roughly
from cluster.advisor.question import Option, Question

Task = tuple[Callable[..., object], tuple[object, ...]]
Run = Callable[[Sequence[Task]], Iterable[object]]
"""Runs tasks, in processes of its own if it likes, and gives results in their order."""

CHAIN = 4
"""Splits beside each other, that one task looks at."""


def contest(question: Question, run: Run, exhaustive: bool = False) -> list[Verdict]:
    """Every option's verdict, best first.

    Args:
        exhaustive: all of them in full.

    Raises:
        InvalidRequest: there is no whole worker.
    """
    whole, *splits = question.options()
    chains = [[whole], *(splits[i : i + CHAIN] for i in range(0, len(splits), CHAIN))]
    verdicts: dict[Option, Verdict] = {}
    for found in run([(roughly, (question, chain)) for chain in chains]):
        assert isinstance(found, list)
        verdicts |= {each.option: each for each in found}
    wanted = sorted(verdicts.values(), key=_merit, reverse=True)
    if not exhaustive:
        wanted = wanted[:2]
    beaten: set[Option] = set()
    while wanted:
        for full in run([(evaluate, (question, each)) for each in wanted]):
            assert isinstance(full, Verdict)
            verdicts[full.option] = full
        second = _second(verdicts.values())
        rough = [each for each in verdicts.values() if each.rough and each.option not in beaten]
        wanted, open_ = [], []
        for each in rough:
            low, high = around(each, question.goal)
            if low >= second > 0:
                wanted.append(each)
            elif high > second > 0:
                open_.append(each)
        kept = run([(keeps_up, (question, each.option, second)) for each in open_])
        wanted += [each for each, keeps in zip(open_, kept, strict=True) if keeps]
        beaten.update(each.option for each in rough if each not in wanted)
    second = _second(verdicts.values())
    for each in verdicts.values():
        if each.rough and each.goodput > second:  # It was not so good in full runs.
            verdicts[each.option] = replace(each, goodput=second)
    return sorted(verdicts.values(), key=_merit, reverse=True)


def _merit(verdict: Verdict) -> tuple[float, bool, float]:
    return verdict.goodput, not verdict.rough, verdict.attainment


def _second(verdicts: Iterable[Verdict]) -> float:
    """The second best goodput in full runs; 0 if there is none."""
    full = sorted(each.goodput for each in verdicts if not each.rough)
    return full[-2] if len(full) > 1 else 0.0
