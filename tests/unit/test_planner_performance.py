"""The performance model: the roofline against measured steps, calibration, drift, efficiency."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.errors import InvalidRequest
from cluster.planner.calibrate import calibrate, fit
from cluster.planner.efficiency import (
    cost_per_request,
    decode_mbu,
    prefill_mfu,
    tokens_per_second_per_user,
)
from cluster.planner.hardware import hardware
from cluster.planner.online import OnlinePerformance
from cluster.planner.performance import Contention, Launch, PrefillCost
from cluster.planner.profile import (
    DecodeSample,
    HandoffSample,
    LaunchSample,
    PathSample,
    PrefillSample,
    Profile,
    SharedSample,
)
from cluster.planner.roofline import roofline
from cluster.planner.shape import load_shape, shape_of
from cluster.simulator.fleet import Deployment
from cluster.simulator.workload import Arrival
from cluster.simulator.world import World

LLAMA = load_shape("meta-llama/Llama-3.1-8B-Instruct")
H200 = hardware("h200")

# vLLM 0.32, Llama-3.1-8B in bf16 on one H200: prompt tokens, or batch at 1,024 tokens each; ms.
PREFILL = {512: 16, 1024: 37, 2048: 49, 4096: 101, 8192: 215, 16384: 471}
DECODE = {1: 4.9, 8: 5.2, 32: 6.7, 64: 8.0, 128: 11.7, 256: 19.7}

MEASURED = Profile(
    "llama-3.1-8b",
    "H200",
    1,
    tuple(PrefillSample(n, 0, ms / 1e3) for n, ms in PREFILL.items()),
    tuple(DecodeSample(b, b * 1024, ms / 1e3) for b, ms in DECODE.items()),
)


def off(predicted: float, measured_ms: float) -> float:
    return abs(predicted * 1e3 - measured_ms) / measured_ms


def test_the_roofline_alone_is_near_a_measured_h200() -> None:
    worker = roofline(LLAMA, H200)
    assert max(off(worker.prefill_seconds(n), ms) for n, ms in PREFILL.items()) < 0.26
    assert max(off(worker.decode_seconds(b, b * 1024), ms) for b, ms in DECODE.items()) < 0.07


def test_calibration_comes_nearer_and_knows_its_error() -> None:
    calibrated = calibrate(roofline(LLAMA, H200), MEASURED)
    worker = calibrated.performance
    errors = sorted(off(worker.prefill_seconds(n), ms) for n, ms in PREFILL.items())
    assert errors[3] < 0.08  # 1,024 tokens at 37 ms lie off every smooth line: the median is near
    assert max(off(worker.decode_seconds(b, b * 1024), ms) for b, ms in DECODE.items()) < 0.05
    assert 0 < calibrated.decode_error.median < calibrated.decode_error.p90 < 0.1
    assert calibrated.prefill_error.samples == 6


def test_a_fit_finds_what_made_the_samples() -> None:
    rows = [(1.0, n, n * n) for n in (100.0, 900.0, 2000.0, 8000.0)]
    made = [0.004 + 2e-5 * r[1] + 3e-10 * r[2] for r in rows]
    assert fit(rows, made) == pytest.approx([0.004, 2e-5, 3e-10])


def test_a_fit_has_no_negative_cost() -> None:
    rows = [(1.0, n) for n in (1.0, 2.0, 3.0)]
    assert fit(rows, [3.0, 2.0, 1.0])[1] == 0.0


def test_handoffs_are_fitted_and_mostly_hidden() -> None:
    samples = tuple(HandoffSample(n, 0.001 + n / 2e9) for n in (10**6, 10**8, 10**9))
    worker = calibrate(roofline(LLAMA, H200), replace(MEASURED, handoff=samples)).performance
    assert worker.handoff.bandwidth == pytest.approx(2e9)
    whole = worker.handoff_seconds(4096)
    assert whole == pytest.approx(0.001 + 4096 * 131072 / 2e9)
    assert worker.exposed_handoff_seconds(4096, 0.0) == pytest.approx(whole)
    # However long the prefill, the last layer's blocks leave after it.
    assert worker.exposed_handoff_seconds(4096, 9.0) == pytest.approx(0.001 + (whole - 0.001) / 32)


def test_what_no_step_takes_is_found_again() -> None:
    """Alone, a simulated request takes what the profile's samples of the way were made from."""
    start = roofline(LLAMA, H200)
    worker = replace(start, dispatch=0.009, handoff=replace(start.handoff, latency=0.012))
    path = []
    for prompt in (200, 1000, 4000):
        (alone,) = World(Deployment(worker, 1, 1, placement_mode="always")).run(
            [Arrival(0.0, prompt, 2)]
        )
        before = alone.ttft - worker.prefill_seconds(prompt)
        path.append(PathSample(prompt, int(prompt * worker.kv_bytes_per_token), before, alone.tpot))
    found = calibrate(start, replace(MEASURED, path=tuple(path))).performance
    assert found.dispatch == pytest.approx(0.009)
    assert found.handoff.latency == pytest.approx(0.012, rel=0.1)


def test_prompts_of_several_steps_are_fitted_as_such() -> None:
    start = replace(roofline(LLAMA, H200), chunk=512)
    start = replace(start, prefill=PrefillCost(0.02, 5e-5, 1e-9, 0.001))
    samples = tuple(
        PrefillSample(n, c, start.prefill_seconds(n, c))
        for n, c in ((32, 0), (128, 0), (512, 0), (513, 512), (1400, 0), (1900, 100))
    )
    profile = replace(MEASURED, prefill=samples, chunk=512)
    worker = calibrate(roofline(LLAMA, H200), profile).performance
    assert worker.prefill.base == pytest.approx(0.02)
    assert worker.prefill_seconds(1400) == pytest.approx(3 * 0.02 + 0.07 + 1400**2 * 1e-9)
    # Step by step, as the simulator computes it, it is as much.
    steps = ((512, 0), (512, 512), (376, 1024))
    assert worker.prefill_seconds(1400) == pytest.approx(
        sum(worker.prefill_batch_seconds([step]) for step in steps)
    )


def test_what_a_prompt_takes_once_is_told_from_its_steps() -> None:
    start = replace(roofline(LLAMA, H200), chunk=512)
    start = replace(start, prefill=PrefillCost(0.003, 5e-5, 1e-9, 0.001, once=0.012))
    samples = tuple(
        PrefillSample(n, c, start.prefill_seconds(n, c))
        for n, c in ((32, 0), (128, 0), (512, 0), (256, 256), (1024, 0), (1900, 0))
    )
    profile = replace(MEASURED, prefill=samples, chunk=512)
    worker = calibrate(roofline(LLAMA, H200), profile).performance
    assert worker.prefill.once == pytest.approx(0.012)
    assert worker.prefill.base == pytest.approx(0.003)
    assert worker.scaled(prefill=2.0).prefill.once == pytest.approx(0.024)
    # Where every prompt is one step there is nothing to tell them apart by.
    short = replace(profile, prefill=samples[:4])
    assert calibrate(roofline(LLAMA, H200), short).performance.prefill.once == 0.0


def ahead() -> Profile:
    """Of an engine that plans ahead."""
    start = replace(roofline(LLAMA, H200), launch=Launch(256, 0.019, 0.041))
    start = replace(start, prefill=PrefillCost(0.005, 2.2e-5, 3e-10))
    sizes = ((32, 0), (128, 0), (64, 64), (256, 256), (512, 0), (1024, 0), (512, 512), (2048, 0))
    samples = tuple(
        PrefillSample(n, c, start.prefill_seconds(n, c))
        for n, c in (*sizes, (4096, 0), (2048, 2048), (8192, 0))
    )
    return replace(MEASURED, prefill=samples, ahead=True, graph_tokens=256)


def test_launches_are_told_from_computing() -> None:
    profile = ahead()
    found = calibrate(roofline(LLAMA, H200), profile)
    assert found.performance.launch == Launch(256, pytest.approx(0.019), pytest.approx(0.041))
    assert found.performance.computing_seconds([(3000, 0)]) == pytest.approx(0.0737)
    assert found.prefill_error.p90 < 0.01
    assert Profile.from_json(profile.to_json()) == profile
    behind = calibrate(roofline(LLAMA, H200), replace(profile, ahead=False))
    assert behind.performance.launch is None
    assert found.performance.scaled(prefill=2.0).launch == Launch(
        256, pytest.approx(0.038), pytest.approx(0.082)
    )


def test_launches_behind_another_are_measured_by_themselves() -> None:
    launch = tuple(LaunchSample(n, s) for n, s in ((512, 0.030), (1024, 0.030), (64, 0.014)))
    profile = replace(ahead(), launch=launch)
    found = calibrate(roofline(LLAMA, H200), profile).performance.launch
    assert found is not None
    assert [found.seconds(n) for n in (100, 600)] == [pytest.approx(0.019), pytest.approx(0.041)]
    behind = [found.seconds(n, behind=True) for n in (100, 600)]
    assert behind == [pytest.approx(0.014), pytest.approx(0.030)]
    assert found.scaled(2.0).seconds(100, behind=True) == pytest.approx(0.028)
    assert Profile.from_json(profile.to_json()) == profile
    only = calibrate(roofline(LLAMA, H200), replace(profile, launch=launch[:2])).performance.launch
    assert only is not None and only.seconds(100, behind=True) == only.seconds(100)


def shared(truth: Contention) -> tuple[SharedSample, ...]:
    """What workers that take this from each other are measured to take."""
    samples = []
    for alone, share, handoffs in ((0.5, 0.9, 0), (0.6, 0.5, 30), (1.1, 0.8, 12), (0.9, 0.0, 0)):
        # Of the seconds, `share` are beside the other worker's steps and pass more slowly.
        seconds = (alone + truth.handoff * handoffs) / (1 - share * (1 - 1 / truth.decode))
        samples.append(SharedSample("decode", alone, seconds, share * seconds, handoffs))
    for alone in (0.03, 0.05, 0.1):
        samples.append(SharedSample("prefill", alone, alone * truth.prefill, alone * truth.prefill))
        way = 0.01 * truth.dispatch
        samples.append(SharedSample("dispatch", 0.01, way, way))
    return tuple(samples)


@pytest.mark.parametrize(
    "truth",
    [
        Contention(),
        Contention(1.2, 1.6, 1.5, 0.008),
        Contention(1.0, 1.5),
        Contention(1.3, 1.0, 1.0, 0.01),
    ],
)
def test_what_workers_take_from_each_other_is_found_again(truth: Contention) -> None:
    profile = replace(MEASURED, shared=shared(truth))
    found = calibrate(roofline(LLAMA, H200), profile).performance.contention
    assert found.prefill == pytest.approx(truth.prefill)
    assert found.decode == pytest.approx(truth.decode)
    assert found.dispatch == pytest.approx(truth.dispatch)
    assert found.handoff == pytest.approx(truth.handoff, abs=1e-9)


def test_workers_that_seem_faster_together_take_nothing_from_each_other() -> None:
    samples = (SharedSample("decode", 1.0, 0.95, 0.9, 4), SharedSample("prefill", 0.1, 0.09, 0.09))
    worker = calibrate(roofline(LLAMA, H200), replace(MEASURED, shared=samples)).performance
    assert worker.contention == Contention()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hardware": "A100"}, "A100, not"),
        ({"model": "qwen2.5-7b"}, "qwen2.5-7b"),
        ({"tensor_parallel": 2}, "2 × H200"),
    ],
)
def test_a_profile_of_another_worker_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        replace(MEASURED, **change).check("llama-3.1-8b", "H200", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "model": 1}'])
def test_what_is_no_profile_is_refused(raw: str) -> None:
    with pytest.raises(InvalidRequest, match="profile"):
        Profile.from_json(raw)


def test_profiles_survive_json_and_refuse_nan() -> None:
    full = replace(MEASURED, shared=shared(Contention(1.1, 1.2, 1.3, 0.01)), chunk=2048)
    for profile in (MEASURED, full):
        assert Profile.from_json(profile.to_json()) == profile
    bad = replace(MEASURED, prefill=(PrefillSample(1, 0, math.nan),))
    with pytest.raises(InvalidRequest, match="nan s"):
        Profile.from_json(bad.to_json())


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="1 decode samples"):
        calibrate(roofline(LLAMA, H200), replace(MEASURED, decode=MEASURED.decode[:1]))


def test_measured_steps_move_the_model_and_nonsense_does_not() -> None:
    online = OnlinePerformance(roofline(LLAMA, H200))
    for _ in range(400):
        online.prefill_measured(2048, 0, online.base.prefill_seconds(2048) * 1.3)
        online.decode_measured(64, 65536, math.nan)
        online.decode_measured(64, 65536, -1.0)
    assert online.current.prefill_seconds(512) == pytest.approx(
        1.3 * online.base.prefill_seconds(512), rel=0.01
    )
    assert online.current.decode == online.base.decode
    assert online.ignored == 800
    assert online.prefill_error < 0.05
    assert math.isnan(online.decode_error)


def test_one_stall_does_not_change_the_model() -> None:
    online = OnlinePerformance(roofline(LLAMA, H200))
    for _ in range(200):
        online.decode_measured(8, 8192, online.base.decode_seconds(8, 8192))
    online.decode_measured(8, 8192, 60.0)
    assert online.current.decode_seconds(8, 8192) < 1.01 * online.base.decode_seconds(8, 8192)


def test_a_mixed_step_reads_the_weights_once() -> None:
    worker = roofline(LLAMA, H200)
    mixed = worker.mixed_seconds([(2048, 0)], 32, 32 * 1024)
    apart = worker.prefill_seconds(2048) + worker.decode_seconds(32, 32 * 1024)
    assert worker.prefill_seconds(2048) < mixed < apart
    assert worker.mixed_seconds([], 32, 32768) == worker.decode_seconds(32, 32768)


def test_efficiency_is_of_the_data_sheet() -> None:
    # 4,096 tokens in 101 ms; 14 GFLOP a token of the layers, attention on top.
    assert prefill_mfu(LLAMA, H200, 1, 4096, 0, 0.101) == pytest.approx(0.6, abs=0.03)
    assert decode_mbu(LLAMA, H200, 1, 64 * 1024, 0.008) == pytest.approx(0.61, abs=0.03)
    assert tokens_per_second_per_user(0.02) == 50


def test_cost_is_split_by_pool() -> None:
    cost = cost_per_request(3.6, 1, 3, 2.0)
    assert (cost.prefill, cost.decode) == pytest.approx((0.0005, 0.0015))
    assert math.isinf(cost_per_request(3.6, 1, 3, 0.0).total)


def test_kv_bytes_are_the_published_ones() -> None:
    assert LLAMA.kv_bytes_per_token == 128 << 10
    assert load_shape("llama-3.1-70b").kv_bytes_per_token == 320 << 10
    assert load_shape("qwen2.5-7b").kv_bytes_per_token == 56 << 10


def test_models_that_do_not_fit_or_do_not_exist_are_named() -> None:
    with pytest.raises(InvalidRequest, match="tensor-parallel"):
        roofline(load_shape("llama-3.1-70b"), H200.__class__("X", 1e15, 1e12, 80e9, 1e11, 1))
    with pytest.raises(InvalidRequest, match="hardware table"):
        hardware("H300")
    with pytest.raises(InvalidRequest, match="neither a directory"):
        load_shape("no-such-model")
    with pytest.raises(InvalidRequest, match="num_hidden_layers"):
        shape_of("m", {"num_attention_heads": 1, "hidden_size": 1})
