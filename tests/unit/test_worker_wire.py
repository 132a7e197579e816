"""What a worker says of its sequences comes to the router as it was, plain tokens in columns."""

from __future__ import annotations

import pytest

from cluster.errors import EngineFailed
from cluster.worker.sequence import SequenceReport, SequenceStep
from cluster.worker.wire import worker_message
from pdserve.v1 import worker_pb2
from router.events import WorkerFailed
from router.output import FinishReason, Stage
from router.worker_wire import output_event, plain_tokens


def test_steps_that_only_go_on_are_columns_and_the_others_messages() -> None:
    report = SequenceReport(1.0)
    sent = worker_message(
        [
            SequenceStep("a", 3, [7], "x"),
            SequenceStep("b", 0, [1, 2, 3], ""),
            SequenceStep("c", 9, [4], "end", finish_reason="length", report=report),
            SequenceStep("d", 1, [], "text alone"),
            SequenceStep("e", 2, [5], "y", stop=5, finish_reason="stop", report=report),
        ],
        None,
        2.0,
    )
    message = worker_pb2.WorkerMessage.FromString(sent.SerializeToString())
    assert list(plain_tokens(message.plain)) == [
        ("a", 3, (7,), "x"),
        ("b", 0, (1, 2, 3), ""),
        ("d", 1, (), "text alone"),
    ]
    c, e = (output_event(output, Stage.DECODE, "w") for output in message.outputs)
    assert not isinstance(c, WorkerFailed) and not isinstance(e, WorkerFailed)
    assert (c.sequence_id, c.offset, c.token_ids, c.text) == ("c", 9, (4,), "end")
    assert c.finish is FinishReason.LENGTH and c.report is not None
    assert (e.sequence_id, e.finish, e.stop) == ("e", FinishReason.STOP, 5)


def test_a_failure_comes_behind_the_tokens_before_it() -> None:
    steps = [
        SequenceStep("a", 3, [7], "x"),
        SequenceStep("a", 0, [], finish_reason="error", error=EngineFailed("it broke")),
    ]
    message = worker_message(steps, None, 0.0)
    assert [entry[0] for entry in plain_tokens(message.plain)] == ["a"]
    assert isinstance(output_event(message.outputs[0], Stage.DECODE, "w"), WorkerFailed)


@pytest.mark.parametrize("column", ["sequence_ids", "offsets", "counts", "token_ids", "texts"])
def test_columns_that_do_not_fit_together_are_no_message(column: str) -> None:
    steps = [SequenceStep("a", 3, [7], "x"), SequenceStep("b", 4, [8], "y")]
    message = worker_message(steps, None, 0.0).plain
    del getattr(message, column)[1:]
    with pytest.raises(ValueError, match=r"announced|shorter|longer"):
        list(plain_tokens(message))
