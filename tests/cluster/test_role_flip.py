"""Real engines change their roles while they serve: streams go on, answers stay what they were."""

from __future__ import annotations

import threading
import time

import grpc

from pdserve.v1 import common_pb2
from tests.cluster.running import Answer, RunningCluster, generate, registered

GREEDY = common_pb2.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LONG = common_pb2.SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
PROMPTS = [[3 + (7 * i + j) % 60 for j in range(20 + 90 * i)] for i in range(5)]


def until_roles(cluster: RunningCluster, wanted: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    while True:
        workers = registered(cluster).values()
        found = {w.worker_id: w.role for w in workers if w.state == "ready"}
        if found == wanted:
            return
        assert time.monotonic() < deadline, f"{found}, not {wanted}"
        time.sleep(0.2)


def test_flips_with_real_engines(cluster: RunningCluster, channel: grpc.Channel) -> None:
    before = {w.worker_id: w.incarnation for w in registered(cluster).values()}
    prefill, decode = sorted(before, key=lambda name: "decode" in name)
    expected = [generate(channel, p, GREEDY).completions[0].token_ids for p in PROMPTS]
    long_expected = generate(channel, PROMPTS[1], LONG).completions[0].token_ids

    streams: list[Answer] = []
    thread = threading.Thread(target=lambda: streams.append(generate(channel, PROMPTS[1], LONG)))
    thread.start()
    time.sleep(0.5)  # it decodes now, and goes on beside the flips
    for worker in (prefill, decode):
        done = cluster.pdserve("flip", worker, "both")
        assert done.returncode == 0, done.stderr
    until_roles(cluster, {prefill: "both", decode: "both"})
    served = [generate(channel, p, GREEDY) for p in PROMPTS for _ in range(3)]
    assert [a.completions[0].token_ids for a in served] == [e for e in expected for _ in range(3)]
    # And the other way round: what prefilled decodes, what decoded prefills.
    for worker, role in ((prefill, "decode"), (decode, "prefill")):
        done = cluster.pdserve("flip", worker, role)
        assert done.returncode == 0, done.stderr
    until_roles(cluster, {prefill: "decode", decode: "prefill"})
    turned = [generate(channel, p, GREEDY) for p in PROMPTS]
    assert [a.completions[0].token_ids for a in turned] == expected
    for answer in turned:
        (report,) = answer.completed.completions
        assert (report.prefill_worker, report.decode_worker) == (decode, prefill)
        assert report.HasField("handoff")
    thread.join(60)
    assert [a.completions[0].token_ids for a in streams] == [long_expected]

    for worker, role in ((prefill, "both"), (decode, "decode"), (prefill, "prefill")):
        assert cluster.pdserve("flip", worker, role).returncode == 0
    until_roles(cluster, {prefill: "prefill", decode: "decode"})
    assert cluster.pdserve("release", "--all").returncode == 0
    after = registered(cluster)
    assert {w.worker_id: w.incarnation for w in after.values()} == before
    assert [generate(channel, p, GREEDY).completions[0].token_ids for p in PROMPTS] == expected
    cluster.wait_idle()
