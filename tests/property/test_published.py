"""The simulator against what others published and measured."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from bench import splitwise
from bench.distserve import goodput, met, workloads
from cluster.planner.performance import DecodeCost, HandoffCost, Performance, PrefillCost
from cluster.planner.queueing import md1_ttft, md1_ttft_pipeline, md1_ttft_tensor
from cluster.simulator.engine import EngineLimits
from cluster.simulator.fleet import Deployment
from cluster.simulator.outcome import Outcome, Targets, attainment, tpot, ttft
from cluster.simulator.workload import Arrival, poisson
from cluster.simulator.world import World

DATA = Path(__file__).parent.parent / "data"

# DistServe and vLLM of its time: whole prompts, never in one step with decodes.
UNMIXED = EngineLimits(max_tokens=2048, mixes=False, cache_share=0.0)


def opt13b(tensor_parallel: int, kv_capacity: int) -> Performance:
    """OPT-13B on A100s by DistServe's own fitted step times."""
    table = json.loads((DATA / "distserve_a100_profile.json").read_text())
    costs = table["facebook/opt-13b"][str(tensor_parallel)]
    seconds = {name: [ms / 1e3 for ms in costs[name]] for name in costs if name != _THRESHOLD}
    return Performance(
        PrefillCost(*seconds["prefill"]),
        DecodeCost(*seconds["decoding_smallbs"]),
        DecodeCost(*seconds["decoding_largebs"]),
        costs[_THRESHOLD],
        HandoffCost(0.0005, 200e9, 40),
        kv_bytes_per_token=2 * 40 * 5120 * 2,
        kv_capacity=kv_capacity,
        gpus=tensor_parallel,
    )


_THRESHOLD = "decoding_large_small_bs_threshold"


def measured(system: str) -> dict[float, tuple[list[Arrival], list[Outcome]]]:
    """By rate: what came, and what the real system took for it."""
    runs: dict[float, tuple[list[Arrival], list[Outcome]]] = defaultdict(lambda: ([], []))
    with (DATA / "distserve_opt13b_sharegpt.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["system"] != system:
                continue
            arrivals, outcomes = runs[float(row["rate"])]
            at, prompt, output = float(row["at"]), int(row["prompt"]), int(row["output"])
            arrivals.append(Arrival(at, prompt, output))
            first, each = float(row["ttft_ms"]) / 1e3, float(row["tpot_ms"]) / 1e3
            outcomes.append(Outcome("", at, prompt, output, first, each, at))
    return runs


def distserve() -> Deployment:
    return Deployment(
        opt13b(2, 163_008),
        prefill=1,
        decode=1,
        limits=UNMIXED,
        decode_performance=opt13b(1, 66_144),
        late_admission=False,
        placement_mode="always",
    )


@cache
def simulated(rate: float) -> list[Outcome]:
    """What ours makes of the arrivals of the real DistServe's run at that rate."""
    arrivals, _ = measured("distserve")[rate]
    return World(distserve()).run(arrivals)


def test_attainment_is_that_of_the_real_distserve_within_three_points() -> None:
    """Seven rates, 1 to 4 requests/s and GPU; TTFT ≤ 0.25 s and TPOT ≤ 0.1 s."""
    targets = Targets(0.25, 0.1)
    runs = measured("distserve")
    assert sorted(runs) == [3, 4.5, 6, 7.5, 9, 10.5, 12]
    for rate, (_, real) in runs.items():
        off = 100 * (attainment(simulated(rate), targets) - attainment(real, targets))
        assert abs(off) <= 3, f"{off:+.1f} points at {rate} requests/s"


def test_distserves_row_of_its_table_2_is_met_within_three_points() -> None:
    """At TTFT 0.5 s and TPOT 0.13 s, found by search: its targets are not stated with it."""
    table = {3: 100, 4.5: 100, 6: 99.3, 7.5: 87.3, 9: 83.0, 10.5: 77.3, 12: 70.0}
    for rate, real in table.items():
        off = 100 * attainment(simulated(rate), Targets(0.5, 0.13)) - real
        assert abs(off) <= 3, f"{off:+.1f} points at {rate} requests/s"


def test_ttft_percentiles_are_those_of_the_real_distserve() -> None:
    for rate, (_, real) in measured("distserve").items():
        assert ttft(simulated(rate)).p50 == pytest.approx(ttft(real).p50, rel=0.12)
        assert ttft(simulated(rate)).p90 == pytest.approx(ttft(real).p90, rel=0.12)
        # Its decode loop costs more than the steps it was fitted to: 20 to 30 % at the median.
        assert 0.68 < tpot(simulated(rate)).p50 / tpot(real).p50 < 1.0


def fixed(seconds: float) -> Performance:
    """A worker on which every prompt takes so long, and nothing is batched."""
    none = DecodeCost(0.0, 0.0)
    return Performance(
        PrefillCost(0.0, seconds / 100), none, none, 10**9, HandoffCost(0, 1e12), 1.0, 10**9
    )


@pytest.mark.slow
@pytest.mark.parametrize(("load", "requests"), [(0.3, 10_000), (0.5, 20_000), (0.7, 50_000)])
def test_m_d_1_within_two_percent(load: float, requests: int) -> None:
    """DistServe §3, one prompt at a time."""
    assert mean_ttft(load / 0.1, 0.1, requests) == pytest.approx(
        md1_ttft(load / 0.1, 0.1), rel=0.02
    )


@pytest.mark.slow
def test_m_d_1_of_pipelines_and_tensor_parallelism_within_two_percent() -> None:
    rate, service, speedup = 8.0, 0.1, 1.6
    pipeline = mean_ttft(rate, service / 2, 15_000) + service / 2
    assert pipeline == pytest.approx(md1_ttft_pipeline(rate, service), rel=0.02)
    tensor = mean_ttft(rate, service / speedup, 20_000)
    assert tensor == pytest.approx(md1_ttft_tensor(rate, service, speedup), rel=0.02)


def mean_ttft(rate: float, service: float, requests: int) -> float:
    """Simulated: one prefill worker on which every prompt takes `service` seconds."""
    limits = EngineLimits(max_tokens=100, cache_share=0.0)
    arrivals = poisson(rate, requests / rate, lambda _: (100, 1), seed=7)
    deployment = Deployment(
        fixed(service), prefill=1, limits=limits, timeout=1e9, late_admission=False
    )
    outcomes = World(deployment).run(arrivals)
    return sum(o.ttft for o in outcomes) / len(outcomes)


@pytest.mark.slow
def test_distserve_bears_what_was_measured_on_the_workloads_with_published_step_times() -> None:
    """Goodput a GPU at 90 %, within 15 % (8 and more draws come within 9 %)."""
    chosen = [w for w in workloads() if not w.name.startswith("175B")]
    for each in chosen:
        assert goodput(each, "distserve", seeds=3) == pytest.approx(each.distserve, rel=0.15)


def test_a_split_bears_more_a_gpu_than_the_vllm_of_its_time() -> None:
    (humaneval,) = [w for w in workloads() if w.name == "66B HumanEval"]
    assert met(humaneval, "distserve", 0.875, seeds=1) > 0.9
    assert met(humaneval, "vllm", 0.875, seeds=1) < 0.75


def test_splitwises_slos_are_met_until_they_are_not() -> None:
    """The bench's machine, from steps that are exactly of the fitted form, in all 40 machines."""
    truth = Performance(
        PrefillCost(0.02, 1e-4, 1e-9), DecodeCost(0.03, 1e-7, 2e-4), DecodeCost(0.03, 1e-7, 2e-4),
        1, HandoffCost(0.005, 5e10, 70), 4e6, 77_000,
    )  # fmt: skip
    sizes = [(n, 1) for n in (512, 1024, 2048, 4096)] + [(512, b) for b in (2, 8, 64)]
    steps = {
        (n, b): (truth.prefill_batch_seconds([(n, 0)] * b), truth.decode_seconds(b, n * b))
        for n, b in sizes
    }
    fitted = splitwise.machine(steps)
    assert fitted.prefill_seconds(3000) == pytest.approx(truth.prefill_seconds(3000))
    assert fitted.decode_seconds(20, 30_000) == pytest.approx(truth.decode_seconds(20, 30_000))
    reference = fitted.scaled(1.8, 1.3)
    columns = ([800, 1500], [100, 200])

    def bears(rate: float, prefill: int) -> bool:
        return splitwise.bears(fitted, reference, prefill, splitwise.workload(columns, rate, 1))

    assert bears(4.0, 25)
    assert not bears(60.0, 39)  # one machine is left to decode
    assert not bears(60.0, 1)
