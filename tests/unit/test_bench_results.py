"""What the benches make of timings, progress lines and processes."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import psutil
import pytest

from bench import cluster_cpu, setup_time, tables
from bench.measure import closed_loop
from bench.memory import part_of, tree
from bench.samples import Load, Sample, Stopwatch, latency_row, load_row
from bench.upstart import PartReady, part_ready


def sample(ttft: float, tpot: float, tokens: tuple[int, ...] = (1, 2), cached: int = 0) -> Sample:
    return Sample(tokens, ttft, tpot, tpot, ttft + tpot, cached, {"handoff_wait": 0.001}, 4096)


def test_a_stopwatch_counts_gaps_after_the_first_message() -> None:
    watch = Stopwatch()
    watch.saw([7])
    time.sleep(0.02)
    watch.saw([])
    watch.saw([8, 9])
    taken = watch.sample(cached=3)
    assert taken.tokens == (7, 8, 9)
    assert taken.cached == 3
    assert taken.second >= 0.02
    assert taken.tpot == pytest.approx(taken.second / 2)
    assert taken.ttft < taken.total


def test_one_token_has_no_gap() -> None:
    watch = Stopwatch()
    watch.saw([7])
    assert (watch.sample().tpot, watch.sample().second) == (0, 0)


def test_a_stopwatch_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="without a token"):
        Stopwatch().sample()


def test_ratios_are_of_medians() -> None:
    cluster = [sample(0.3, 0.02), sample(0.1, 0.02), sample(0.2, 0.04)]
    row = latency_row(128, cluster, [sample(0.1, 0.01)] * 3)
    assert row["ttft_cluster_ms"] == pytest.approx(200)
    assert row["ttft_cluster_range_ms"] == pytest.approx([100, 300])
    assert row["ttft_ratio"] == pytest.approx(2)
    assert row["tpot_ratio"] == pytest.approx(2)
    assert row["handoff_wait_ms"] == pytest.approx(1)
    assert (row["handoff_bytes"], row["same_tokens"], row["cold"]) == (4096, 3, True)


def test_other_tokens_and_cache_hits_show() -> None:
    row = latency_row(8, [sample(1, 1)], [sample(1, 1, tokens=(1, 3), cached=4)])
    assert (row["same_tokens"], row["cold"]) == (0, False)


def test_a_load_is_its_tokens_over_its_seconds() -> None:
    fast, slow = Load(1.0, (sample(1, 1),) * 4), Load(2.0, (sample(2, 1),) * 4)
    assert (fast.rate, slow.rate) == (8, 4)
    row = load_row(512, 2, [slow], [fast])
    assert row["tokens_per_second_ratio"] == pytest.approx(0.5)
    assert row["ttft_ratio"] == pytest.approx(2)
    assert "0.50" in tables.load_table(row)


class Counting:
    def __init__(self) -> None:
        self.now = self.most = 0

    async def run(self, prompt: list[int], max_tokens: int) -> Sample:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        return sample(0.1, 0.1)


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    system = Counting()
    load = await closed_loop(system, [[1]] * 10, 2, concurrency=3)
    assert (len(load.samples), system.most) == (10, 3)


@pytest.mark.parametrize(
    ("line", "ready"),
    [
        ("  12.3 s  recall-tiny-prefill-0: ready 127.0.0.1:9", ("recall-tiny-prefill-0", 12.3)),
        ("   0.0 s  store: starting", None),
        ("FutureWarning: ready", None),
    ],
)
def test_progress_lines(line: str, ready: tuple[str, float] | None) -> None:
    assert part_ready(line, 20.0) == (PartReady(*ready, 20.0) if ready else None)


@pytest.mark.parametrize(
    ("command", "log", "part"),
    [
        (["ray::RouterActor.run"], "/run/pdserve/logs/router-0.log", ("router-0", "main")),
        (["VLLM::Worker_0"], "/r/logs/m-decode-0.log", ("m-decode-0", "engine worker")),
        (["/x/gcs_server", "--dir=/tmp/pdserve"], "/t/logs/gcs.log", ("ray", "gcs_server")),
        (["/v/bin/python", "/v/bin/pdserve", "up"], "/r/logs/cli.log", ("cli", "pdserve up")),
        (["/x/valkey-server", "/r/pdserve/store.conf"], "", ("store", "valkey")),
        (["ray::IDLE"], "/dev/null", ("ray", "ray::IDLE")),
        (["VLLM::EngineCore"], "pipe:[1]", ("other", "engine core")),
        ([], "", ("other", "?")),
    ],
)
def test_processes_have_names(command: list[str], log: str, part: tuple[str, str]) -> None:
    assert part_of(command, log) == part


def test_a_tree_holds_this_process() -> None:
    rows = tree(psutil.Process(), 0, 0.01)
    mine = next(row for row in rows if row.pid == os.getpid())
    assert mine.rss > 1 << 20
    assert mine.pss is None or mine.pss <= mine.rss


def test_one_token_makes_tables_too() -> None:
    names = ("queue", "prefill_queue", "prefill", "handoff_wait", "decode_queue", "first_step")
    one = Sample((1,), 0.1, 0.0, 0.0, 0.1, phases=dict.fromkeys(names, 0.0))
    row = latency_row(128, [one], [one])
    assert row["tpot_ratio"] is None
    assert "1.00" in tables.latency_table([row])
    assert tables.phase_table([row])
    assert tables.load_table(load_row(128, 1, [Load(1, (one,))], [Load(1, (one,))]))


def test_tables_are_aligned() -> None:
    lines = tables.table(["a", "bb"], [["long", "1"], ["b", "1000"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| ---- | ---: |"


@pytest.mark.parametrize("bad", [["--runs", "0"], ["--prompts", "0"], ["--output", "0"]])
def test_impossible_arguments_are_refused(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cluster_cpu.arguments(bad)
    assert refused.value.code == 2


def test_setup_runs_as_a_fresh_user() -> None:
    base = {"PYTHONPATH": "/x", "HOME": "/h"}
    env = setup_time.environment(base, Path("/t"), no_cache=False)
    assert env == {"HOME": "/h", "PDSERVE_RUNTIME_DIR": "/t/run"}
    assert setup_time.environment(base, Path("/t"), True)["PIP_NO_CACHE_DIR"] == "1"
