"""What the predicted-against-measured bench sends, keeps, and makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu import models
from bench.predicted import pace
from bench.predicted.clients import Seen
from bench.predicted.record import Load, Ran, Record, order
from bench.predicted.rows import Row, Times, row_of, table
from bench.predicted.setting import DEMO, GPUS
from cluster.config import ModelConfig
from cluster.planner.hardware import hardware
from cluster.planner.profile import DecodeSample, PrefillSample, Profile
from cluster.planner.roofline import roofline
from cluster.planner.shape import SHAPES
from cluster.simulator.engine import EngineLimits
from cluster.simulator.outcome import Percentiles, Targets
from router.tokenize import Tokenizer

SHAPE = SHAPES["llama-3.1-8b"]
WORKER = roofline(SHAPE, hardware("H100"))
RAN = Ran(SHAPE, "H100", 196_608, EngineLimits(8192, 128), "always", dict(GPUS.workloads))
PROFILE = Profile(
    SHAPE.name,
    "H100",
    1,
    tuple(PrefillSample(n, 0, WORKER.prefill_seconds(n)) for n in (512, 2048, 8192)),
    tuple(DecodeSample(n, 1024 * n, WORKER.decode_seconds(n, 1024 * n)) for n in (1, 16, 64)),
)


def times(ttft: float, tpot: float) -> Times:
    return Times(Percentiles(ttft, 2 * ttft, 3 * ttft), Percentiles(tpot, tpot, tpot), 1.0)


def as_predicted(record: Record, workload: str, rate: float) -> list[Seen]:
    """A cluster that takes exactly as long as the simulated one."""
    arrivals = replace(GPUS, seconds=3.0).arrivals(workload, rate)
    outcomes = record.split().predict(arrivals)
    return [
        Seen(
            o.at,
            o.prompt,
            o.output,
            0.001,
            o.ttft,
            o.tpot,
            (0.1, 0.2),
            0.05,
            4096,
            "nccl",
            (3, 50, 51),
        )
        for o in outcomes
    ]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path, {"machine": "made up"}, RAN)
    made.profile_path.write_text(PROFILE.to_json())
    return made


def test_a_load_is_the_same_each_time_and_within_its_limits() -> None:
    for setting in (DEMO, GPUS):
        for workload in setting.workloads:
            arrivals = setting.arrivals(workload, 40.0)
            assert arrivals == setting.arrivals(workload, 40.0)
            assert max(a.prompt for a in arrivals) <= setting.longest_prompt
            assert max(a.output for a in arrivals) <= setting.longest_output
            means = setting.workloads[workload]
            for mean, sent in zip(means, ("prompt", "output"), strict=True):
                lengths = [getattr(a, sent) for a in arrivals]
                assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.15)


def test_the_fuller_worker_bounds_the_rates() -> None:
    assert GPUS.bearable(WORKER, "summarise") == 1 / WORKER.prefill_seconds(6000)
    step = WORKER.decode_seconds(128, 128 * 456)
    assert GPUS.bearable(WORKER, "chat") == pytest.approx(128 / (step * 400))


def test_errors_are_of_what_was_measured() -> None:
    assert times(0.2, 0.01).off(times(0.1, 0.02)) == pytest.approx([1.0, 1.0, 0.5, 0.5])


def test_a_cluster_as_predicted_is_off_by_nothing(record: Record) -> None:
    seen = as_predicted(record, "chat", 8.0)
    row = row_of(record.split(), "chat", GPUS.workloads["chat"], 8.0, seen)
    assert row.predicted == row.measured
    assert row.predicted.off(row.measured) == [0.0] * 4
    slower = [replace(s, ttft=1.25 * s.ttft, tpot=1.25 * s.tpot) for s in seen]
    row = row_of(record.split(), "chat", GPUS.workloads["chat"], 8.0, slower)
    assert row.predicted.off(row.measured) == pytest.approx([0.2] * 4)


def test_a_request_that_failed_is_not_in_time(record: Record) -> None:
    seen = as_predicted(record, "chat", 8.0)
    failed = Seen(*(getattr(seen[0], n) for n in ("at", "prompt", "output", "late")), error="no")
    row = row_of(record.split(), "chat", (256, 400), 8.0, [failed, *seen[1:]])
    whole = row_of(record.split(), "chat", (256, 400), 8.0, seen)
    assert (row.failed, whole.failed) == (1, 0)
    assert row.measured.in_time == pytest.approx(whole.measured.in_time - 1 / len(seen))
    assert f"{len(seen)}, 1 failed" in table([row])


def test_the_table_tells_how_far_a_second_measurement_is_off() -> None:
    row = Row("chat", 8.0, 9, 0, Targets(1, 1), times(0.11, 0.01), times(0.1, 0.01))
    assert "Error: median 5%, p90 10%" in table([row])
    assert "again" not in table([row])
    again = replace(row, again=times(0.13, 0.01))
    assert "off the first time by 15% in the median, 30% at p90" in table([again])


def test_what_a_run_left_is_predicted_anew(record: Record, tmp_path: Path) -> None:
    seen = tuple(as_predicted(record, "summarise", 2.0))
    dead = replace(seen[0], ttft=float("inf"), tpot=float("inf"), error="gone")
    record.loads = [
        Load("chat", 8.0, tuple(as_predicted(record, "chat", 8.0))),
        Load("summarise", 2.0, seen, (dead, *seen[1:])),
    ]
    record.save()
    former = Record.read(tmp_path)
    assert former.ran == record.ran
    assert former.loads == record.loads
    assert former.rows() == record.rows()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["rows"][1]["again"]["in_time"] < written["rows"][1]["measured"]["in_time"]
    assert table(former.rows()) in (tmp_path / "table.md").read_text()


def test_a_profile_of_something_else_is_not_used(record: Record) -> None:
    record.profile_path.write_text(replace(PROFILE, hardware="A100").to_json())
    with pytest.raises(Exception, match="was measured with"):
        record.split()


def test_every_load_is_sent_once_before_any_is_sent_twice() -> None:
    loads = order(["a", "b"], (0.2, 0.4, 0.6))
    assert [run for *_, run in loads] == [0] * 6 + [1] * 2
    assert loads[6:] == [("a", 0.4, 1), ("b", 0.4, 1)]


def test_a_made_up_tokenizer_has_the_whole_vocabulary(tmp_path: Path) -> None:
    folder = models.write(models.TINY, tmp_path / "tiny")
    models.write_tokenizer(models.TINY, folder)
    tokenizer = Tokenizer.load(ModelConfig(name="tiny", path=str(folder)))
    assert tokenizer.vocab_size == models.TINY["vocab_size"]
    assert list(tokenizer._ids("Grüße", add_special_tokens=True)) == [
        tokenizer._pretrained.convert_tokens_to_ids(c) for c in ("G", "r", "Ã", "¼", "Ã", "Ł", "e")
    ]
    assert len(tokenizer._pretrained.decode(list(range(1024)), skip_special_tokens=True)) > 1024


def test_the_pace_is_the_first_one_s_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.010, 0.0125, 0.008])
    monkeypatch.setattr(pace, "_seconds", lambda: next(seconds))
    found = pace.Pace()
    assert [found.measure(), found.measure()] == pytest.approx([0.8, 1.25])
    assert str(found) == "0.80 1.25"


def test_a_machine_has_a_pace() -> None:
    assert 0 < pace._seconds() < float("inf")
