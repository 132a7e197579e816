"""What a worker counts of its sequences."""

from __future__ import annotations

import pytest

from cluster.engine.protocol import Sampling
from cluster.worker.sequence import SequenceStart, SequenceStep, Stage
from cluster.worker.tally import Tally


def start(stage: Stage) -> SequenceStart:
    return SequenceStart("s", stage, [5, 6, 7], Sampling(max_tokens=4), b"", "")


def counts(tally: Tally) -> tuple[int, int, int]:
    return tally.prompt_tokens, tally.output_tokens, tally.begun


@pytest.mark.parametrize(
    ("stage", "prompt", "output"), [("prefill", 3, 4), ("whole", 3, 4), ("decode", 0, 3)]
)
def test_tokens_are_counted_where_they_were_computed(
    stage: Stage, prompt: int, output: int
) -> None:
    tally, seen = Tally(), list[SequenceStep]()
    with tally.of(start(stage), seen.append) as emit:
        emit(SequenceStep("s", 0, []))
        assert counts(tally) == (0, 0, 0)
        for step in (SequenceStep("s", 0, [1]), SequenceStep("s", 1, [2, 3, 4])):
            emit(step)
        assert counts(tally) == (prompt, output, 1)
    assert counts(tally) == (prompt, output, 0)
    assert [step.token_ids for step in seen] == [[], [1], [2, 3, 4]]


def test_one_that_breaks_runs_no_more() -> None:
    tally = Tally()
    with pytest.raises(RuntimeError), tally.of(start("whole"), lambda _: None) as emit:
        emit(SequenceStep("s", 0, [1]))
        raise RuntimeError
    with pytest.raises(RuntimeError), tally.of(start("whole"), lambda _: None):
        raise RuntimeError
    assert counts(tally) == (3, 1, 0)
